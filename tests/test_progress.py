"adcam.progress: one bar for terminal, notebook and log."
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import nbformat.v4 as v4
from conftest import ROOT
from nbclient import NotebookClient

WORK = "from adcam.progress import tqdm\nimport time\nfor i in tqdm(range(400), desc='measure', unit='image'): time.sleep(.002)"


def at_terminal(program: str, columns: int = 100) -> str:
    "What a program writes to a terminal."
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", program], stderr=follower, stdout=subprocess.DEVNULL)
    os.close(follower)
    out = b""
    while True:
        try: part = os.read(leader, 65536)
        except OSError: break  # its other end is closed
        if not part: break
        out += part
    assert child.wait() == 0, out.decode()
    os.close(leader)
    return out.decode()


def test_a_terminal_sees_a_line_that_is_overwritten_with_the_time_left():
    text = at_terminal(WORK)
    assert text.count("\r") > 3 and re.search(r"measure: +\d+%.*\d/400 \[\d\d:\d\d<\d\d:\d\d", text)


def test_a_log_gets_one_line():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "400/400" in done.stderr and "\r" not in done.stderr


def test_a_hidden_bar_says_nothing_anywhere():
    hidden = "from adcam.progress import tqdm\nfor i in tqdm(range(9), disable=True): pass\nfor i in tqdm(range(9), delay=5): pass"
    assert subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True).stderr == ""


def test_an_executed_notebook_keeps_one_line_per_bar():
    nb = v4.new_notebook(cells=[v4.new_code_cell(WORK + "\n" + WORK)])
    NotebookClient(nb, kernel_name="python3").execute()
    outputs = nb.cells[0].outputs
    assert [o.output_type for o in outputs] == ["display_data"] * 2
    assert all("400/400" in o.data["text/plain"] and "\r" not in o.data["text/plain"] for o in outputs)


def test_a_bar_that_is_left_early_says_where():
    early = "from adcam.progress import tqdm\nwith tqdm(total=10) as bar: bar.update(3)"
    assert "3/10" in subprocess.run([sys.executable, "-c", early], capture_output=True, text=True).stderr


def test_the_terminal_sees_the_bars_of_other_processes():
    text = at_terminal("import subprocess, sys\nfrom adcam.progress import watch\n"
                       f"with watch(lambda: 'fig4', .05): subprocess.run([sys.executable, '-c', {WORK!r}], stderr=subprocess.DEVNULL)")
    assert re.search(r"\rfig4|fig4 +measure: +\d+%", text) and "measure" in text and text.endswith("\r\x1b[K")


def test_without_a_terminal_nothing_is_watched():
    code = "import os\nfrom adcam.progress import watch\nwith watch(): print(os.environ.get('ADCAM_PROGRESS'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_there_is_no_other_bar():
    others = [p.name for p in (ROOT / "adcam").rglob("*.py") if p.name != "progress.py" and re.search(r"^\s*(from|import) tqdm", p.read_text(), re.M)]
    assert not others
