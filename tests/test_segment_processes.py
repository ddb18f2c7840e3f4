"""adcam.segment in two processes, really started by `accelerate launch` on CPU (gloo); one of them is killed on the way."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from adcam.segment import train_segmentation
from test_segment import QUICK, Blobs, Net, ds, truth

CONFIG = replace(QUICK, iterations=10, freeze_bn=True)     # BatchNorm statistics of a part would depend on the split
LIVE = replace(QUICK, iterations=6, freeze_bn=False, scales=(1.,))  # those of the whole batch do not; and no view is padded, so all parts count as many pixels


class Double(Net):
    "float64, so that rounding can hide nothing; without dropout, whose numbers depend on the split"
    def __init__(self):
        super().__init__(dropout=0.)
        self.double()

    def forward(self, x): return super().forward(x.double())


class Deadly(Double):
    "One of two processes dies in its seventh iteration, which is after the first checkpoint, when the command is given for the first time"
    steps = 0
    def forward(self, x):
        self.steps += self.training
        if self.steps == 7 and os.environ.get("RANK") == "1" and os.environ["ATTEMPT"] == "0": os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


CASES = dict(live=(Double, LIVE, None), killed=(Deadly, CONFIG, Blobs(3)))


def one_case(name, out=None):
    "-> history, network"
    network, config, val = CASES[name]
    AcceleratorState._reset_state()
    try: return train_segmentation(net := network(), ds, truth, config, out=out, val=val, progress=False), net
    finally: AcceleratorState._reset_state()


SCRIPT = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_segment_processes import one_case
for name in sys.argv[1:]:
    history, net = one_case(name, Path({out!r})/name)
    if os.environ["RANK"] == "0": torch.save(net.state_dict(), Path({out!r})/name/"model.pt")
"""


def launch(out: Path, attempt: int, *names: str) -> tuple[int, str]:
    env = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ATTEMPT=str(attempt))
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    with open(out/f"stderr{attempt}.txt", "w+") as said:
        job = subprocess.Popen([*words, str(out/"script.py"), *names], env=env, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try: code = job.wait(timeout=900)
        finally:
            if job.poll() is None: os.killpg(job.pid, signal.SIGKILL)
        said.seek(0)
        return code, said.read()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two processes")
    (out/"script.py").write_text(SCRIPT.format(tests=os.path.dirname(__file__), out=str(out)))
    code, said = launch(out, 0, *CASES)
    assert code != 0 and "exitcode: -9" in said, said[-3000:]
    assert (out/"killed/last.pt").exists() and not (out/"killed/weights.safetensors").exists()
    code, said = launch(out, 1, "killed")
    assert code == 0, said[-3000:]
    return out


def rows(folder: Path) -> list[dict]: return [json.loads(line) for line in (folder/"log.jsonl").read_text().splitlines()]


def test_two_processes_one_of_them_killed_give_the_curve_of_one_undisturbed(two):
    "Two parts on one process are one part on each of two; validation is shared; SIGKILL and a second command change nothing"
    history, net = one_case("killed")
    told = rows(two/"killed")
    np.testing.assert_allclose([r["loss"] for r in told], [r["loss"] for r in history], rtol=1e-6)
    np.testing.assert_allclose([r["objects"] for r in told], [r["objects"] for r in history], rtol=1e-5)
    np.testing.assert_allclose([r["miou"] for r in told if "miou" in r], [r["miou"] for r in history if "miou" in r], rtol=1e-9)
    for k, v in torch.load(two/"killed/model.pt", weights_only=True).items(): torch.testing.assert_close(v, net.state_dict()[k], rtol=1e-9, atol=1e-9, msg=k)


def test_batchnorm_sees_both_processes(two):
    "Trained BatchNorm: two processes with a part each have the statistics of the whole batch, which one process has with one part"
    AcceleratorState._reset_state()
    history = train_segmentation(net := Double(), ds, truth, replace(LIVE, accumulate=1), progress=False)
    AcceleratorState._reset_state()
    np.testing.assert_allclose([r["loss"] for r in rows(two/"live")], [r["loss"] for r in history], rtol=1e-6)
    for k, v in torch.load(two/"live/model.pt", weights_only=True).items(): torch.testing.assert_close(v, net.state_dict()[k], rtol=1e-8, atol=1e-8, msg=k)
