"""adcam.classifier in two processes, really started by `accelerate launch` on CPU (gloo), one of them killed on the way."""
import json, os, signal, subprocess, sys, time
from dataclasses import replace

import numpy as np, pytest, torch
from accelerate.state import AcceleratorState
from timm.layers import BatchNormAct2d
from torch import nn

from adcam.classifier import PretrainConfig, pretrain, train
from adcam.training import _whole_batch_norm
from test_classifier import QUICK, Photos, fresh

WHOLE = replace(QUICK, epochs=2, sync_bn=True, drop_path=0.5)  # everything that could depend on the split is on
FROZEN = replace(QUICK, epochs=2, freeze_bn=True, drop_path=0.)


class Double(nn.Module):
    "A network in float64: there rounding can neither hide a mistake nor be blown up by AdamW. Also the smallest network that `train` takes"
    def __init__(self, net):
        super().__init__()
        self.net, self.num_classes, self.set_drop_path = net.double(), net.num_classes, net.set_drop_path
    def forward(self, x): return self.net(x.double())
    def param_groups(self): return {g: ["net."+n for n in names] for g, names in self.net.param_groups().items()}


class Deadly(Double):
    "One of two processes dies in its fifth step, which is in the second epoch, when the command is given for the first time"
    steps = 0
    def forward(self, x):
        self.steps += 1
        if self.steps==5 and os.environ.get("RANK")=="1" and os.environ["ATTEMPT"]=="0": os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def double(*a, **kw): return Double(fresh(*a, **kw))
def masks(model, ds, **kw):
    return pretrain(model, ds, PretrainConfig(epochs=2, batch=4, crop=32, resize=None, mask_ratio=.4, freeze_bn=True, drop_path=.3), **kw)


def watched(model, ds, **kw):
    "What a slow callback of the main process writes is there for every process once the training is over"
    def note(*_): time.sleep(1.5); (kw["out"]/"seen").touch()
    history = train(model, ds, replace(FROZEN, epochs=1), callback=note, **kw)
    assert (kw["out"]/"seen").exists(), "a process did not wait for the callback"
    return history


CASES = dict(  # name -> (network, data, how to train it in `world` processes)
    whole=(double, Photos(), lambda m, ds, world, **kw: train(m, ds, WHOLE, **kw)),
    unused=(lambda: double("output"), Photos(), lambda m, ds, world, **kw: train(m, ds, replace(WHOLE, clip_norm=.5), **kw)),
    masks=(lambda: fresh("none"), Photos(True), lambda m, ds, world, **kw: masks(m, ds, **kw)),
    parts=(double, Photos(), lambda m, ds, world, **kw: train(m, ds, FROZEN, accumulate=world, **kw)),
    small_bn=(double, Photos(), lambda m, ds, world, **kw: train(m, ds, replace(FROZEN, freeze_bn=False), **kw)),
    watched=(double, Photos(), lambda m, ds, world, **kw: watched(m, ds, **kw)),
    bf16=(fresh, Photos(), lambda m, ds, world, **kw: train(m, ds, replace(WHOLE, epochs=1, mixed_precision="bf16"), **kw)),
    killed=(lambda: Deadly(fresh()), Photos(), lambda m, ds, world, **kw: train(m, ds, replace(WHOLE, epochs=3), **kw)))


def one_case(name, world, out=None):
    "-> history, network"
    network, ds, run = CASES[name]
    model = network()
    AcceleratorState._reset_state()  # accelerate keeps one precision per process
    try: return run(model, ds, world, out=out, progress=False), model
    finally: AcceleratorState._reset_state()


SCRIPT = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_distributed import one_case
for name in sys.argv[1:]:
    history, model = one_case(name, 2, Path({out!r})/name)
    if os.environ["RANK"]=="0": torch.save(model.state_dict(), Path({out!r})/name/"model.pt")
"""


def launch(out, attempt, *names):
    "Two processes that train the cases one after the other -> exit code, what they said"
    env = dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ATTEMPT=str(attempt))
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    with open(out/f"stderr{attempt}.txt", "w+") as said:
        job = subprocess.Popen([*words, str(out/"script.py"), *names], env=env, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try: code = job.wait(timeout=300)
        finally:
            if job.poll() is None: os.killpg(job.pid, signal.SIGKILL)
        said.seek(0)
        return code, said.read()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Folder with every case, trained by two processes; and what they said. In the last case one of them dies, and the command is given again"
    out = tmp_path_factory.mktemp("two processes")
    (out/"script.py").write_text(SCRIPT.format(tests=os.path.dirname(__file__), out=str(out)))
    code, said = launch(out, 0, *CASES)
    assert code!=0 and (out/"killed/last.pt").exists() and not (out/"killed/model.pt").exists(), said[-3000:]
    assert "exitcode: -9" in said, said[-3000:]
    code, again = launch(out, 1, "killed")
    assert code==0, again[-3000:]
    return out, said


def history(folder): return [json.loads(line) for line in (folder/"log.jsonl").read_text().splitlines()]
def losses(rows): return np.array([[r[n] for n in ("loss", "conv", "trans")] for r in rows])


@pytest.mark.parametrize("name,loss,weight",
                         [("whole", 1e-6, 1e-9), ("unused", 1e-6, 1e-9), ("parts", 1e-6, 1e-9), ("masks", 1e-4, None), ("bf16", 2e-2, None)])
def test_two_processes_equal_one(two, name, loss, weight):
    "Losses (logged in float32) and, in float64, weights and BatchNorm statistics"
    rows, model = one_case(name, 1)
    assert json.loads((two[0]/name/"settings.json").read_text())["processes"]==2
    np.testing.assert_allclose(losses(history(two[0]/name)), losses(rows), rtol=loss)
    if name=="masks": np.testing.assert_allclose([r["mask"] for r in history(two[0]/name)], [r["mask"] for r in rows], rtol=loss)
    if weight is None: return
    for n, v in torch.load(two[0]/name/"model.pt", weights_only=True).items():
        torch.testing.assert_close(v, model.state_dict()[n], rtol=weight, atol=weight, msg=n)


def test_a_killed_process_changes_nothing(two):
    "One of two processes got SIGKILL in the second epoch; both were started again; the curve is that of one process that nobody disturbed"
    rows, model = one_case("killed", 1)
    assert len(rows)==9
    np.testing.assert_allclose(losses(history(two[0]/"killed")), losses(rows), rtol=1e-6)
    for n, v in torch.load(two[0]/"killed/model.pt", weights_only=True).items():
        torch.testing.assert_close(v, model.state_dict()[n], rtol=1e-9, atol=1e-9, msg=n)


def test_every_process_waits_for_the_callback(two): assert (two[0]/"watched/model.pt").exists(), two[1][-3000:]


def test_statistics_of_half_a_batch_differ(two):
    "Without sync_bn or freeze_bn the curve depends on the number of processes, and a warning says so"
    rows, _ = one_case("small_bn", 1)
    assert np.abs(losses(history(two[0]/"small_bn"))-losses(rows)).max()>1e-3
    assert two[1].count("from 2 images per process instead of 4")==1  # said by one process


def test_modules_are_as_before(two):
    "Names in the saved state are those of the network, and the network computes with its own modules again"
    assert list(torch.load(two[0]/"whole/model.pt", weights_only=True))==list(double().state_dict())
    _, model = one_case("whole", 1)
    assert not [m for m in model.modules() if "forward" in vars(m)]


# ---- BatchNorm of the whole batch, without processes

@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(3), lambda: nn.BatchNorm2d(3, momentum=None), lambda: nn.BatchNorm2d(3, affine=False),
                                  lambda: nn.BatchNorm2d(3, track_running_stats=False), lambda: BatchNormAct2d(3), lambda: nn.BatchNorm1d(3)])
def test_one_process_is_plain_batchnorm(make):
    "Outputs, gradients and running statistics, of every kind of layer, over three steps"
    ours, theirs = make().double(), make().double()
    for _ in range(3):
        x = torch.randn((4, 3) if isinstance(ours, nn.BatchNorm1d) else (4, 3, 5, 2), dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = _whole_batch_norm(ours, lambda v: v, a), theirs(b)
        torch.testing.assert_close(y, z)
        y.square().sum().backward(); (z.square().sum()).backward()
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(_whole_batch_norm(ours.eval(), None, x), theirs.eval()(x))


def test_half_precision_keeps_its_type_and_wide_sums():
    x = (torch.randn(2, 3, 64, 64)*3+100).to(torch.bfloat16)
    bn = nn.BatchNorm2d(3)
    y = _whole_batch_norm(bn, lambda v: v, x)
    assert y.dtype==torch.bfloat16 and abs(y.float().std()-1)<.02
    torch.testing.assert_close(bn.running_mean, .1*x.float().mean((0, 2, 3)))
