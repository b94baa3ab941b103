"""Code of the user that ends the process: no command has exit code 0 unless it was done."""

import os
import re
import signal
import subprocess
import sys
import time
import unittest

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from robbench.commands.app import _count_as_done_if_it_returns, app
from robbench.core.errors import ModelError, RobbenchError
from robbench.core.user_code import contain_exits, import_user_modules, refuse_exits
from robbench.evaluation.run import evaluate
from robbench.testing import assert_robust
from support.models import small

SUPERVISED = "import atexit, os, signal, sys, time\nfrom robbench.commands.supervise import run_supervised\n"


def supervised(body):
    """Run a function `command` under a parent process, in a fresh interpreter."""
    # A job in the background of a shell, such as these tests, ignores SIGINT, and so would what it starts.
    begin = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"{SUPERVISED}{begin}def command():\n    {body}\n    return 0\nsys.exit(run_supervised(command))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("pass", 0, ""),
        ("return 1", 1, ""),
        ("os._exit(0)", 2, "before the command was done"),
        ("os.execv('/bin/true', ['true'])", 2, "before the command was done"),
        ("os.fork() and os._exit(0); time.sleep(2)", 2, "before the command was done"),
        ("os.closerange(3, 99)", 2, "before the command was done"),
        ("os.fork() or sys.exit(0); os.wait(); return 1", 1, ""),
        ("atexit.register(os._exit, 0); return 1", 1, ""),  # after the report
        ("1 / 0", 1, "ZeroDivisionError"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_an_end_without_a_report_is_no_success(body, code, told):
    with supervised(body) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == code and told in err, err


def test_ctrl_c_counts_once_and_reaches_the_command():
    body = "\n    ".join(
        ["try:", "    print('ready', flush=True); time.sleep(60)", "except KeyboardInterrupt:", "    time.sleep(0.2)"]
    )
    with supervised(f"signal.signal(signal.SIGINT, signal.default_int_handler)\n    {body}\n    return 130") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child that its parent ended")
def test_a_killed_command_does_not_go_on():
    with supervised("print(os.getpid(), flush=True); time.sleep(60)") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        for _ in range(500):
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)
    raise AssertionError("the command went on")


class Ends(nn.Module):
    """A model that ends the process, in its forward or in its gradient."""

    def __init__(self, end, in_gradient=False):
        super().__init__()
        self.net, self.end, self.in_gradient = small(), end, in_gradient

    def forward(self, x):
        if not self.in_gradient:
            self.end()
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(lambda grad: self.end())
        return logits


def raising(kind):
    def end():
        raise kind

    return end


EXITS = [
    raising(SystemExit(0)),
    raising(SystemExit()),
    raising(GeneratorExit()),
    raising(typer.Exit(0)),
    raising(pytest.skip.Exception("no")),
    raising(pytest.exit.Exception("no", 0)),
    raising(unittest.SkipTest("no")),
]


@pytest.mark.parametrize("in_gradient", [False, True])
@pytest.mark.parametrize("end", EXITS)
def test_a_model_that_ends_the_process_is_an_error(problem, end, in_gradient):
    _, x, y = problem
    with pytest.raises(BaseException, match="cannot be") as caught:  # pytest.exit would otherwise end the tests
        evaluate(Ends(end, in_gradient).eval(), "quick", x=x, y=y, eps=0.05)
    assert isinstance(caught.value, ModelError)
    assert re.search(r"cannot be run on images|gradient of the model's answer", str(caught.value))


@pytest.mark.parametrize("end", [*EXITS, raising(KeyError("alone"))])
def test_a_model_of_several_answers_that_ends_the_process_is_an_error(problem, end):
    class Tells(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.asked = small(), []

        def forward(self, x):
            if x.shape[0] == 1 and len(self.asked) > 1:  # after the whole batch, each image alone
                end()
            if x.shape[0] > 2:
                self.asked += [1, 1]
            return {"logits": self.net(x)}

    _, x, y = problem
    with pytest.raises(ModelError, match="cannot be asked for classes"):
        evaluate(Tells().eval(), "quick", x=x, y=y, eps=0.05)


@pytest.mark.parametrize("end", [EXITS[0], lambda: os._exit(0)])
def test_assert_robust_does_not_end_the_tests(problem, monkeypatch, end):
    _, x, y = problem
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"the process would have ended with {status}"))
    with pytest.raises(ModelError, match=r"SystemExit\(0\)|os._exit\(0\)"):
        assert_robust(Ends(end).eval(), x=x, y=y, eps=0.05, at_least=0.0)

    class NamedByAnExit(nn.Linear):
        def extra_repr(self):
            raise SystemExit(0)

    model = nn.Sequential(nn.Flatten(), NamedByAnExit(64, 10)).eval()
    with pytest.raises(ModelError, match=r"SystemExit\(0\) was raised"):
        assert_robust(model, x=x, y=y, eps=0.05, at_least=0.0)


def test_a_command_is_done_only_if_it_returns():
    for end in (*EXITS, lambda: os._exit(0)):
        with pytest.raises(BaseException, match="command") as caught:  # pytest.exit would otherwise end the tests
            _count_as_done_if_it_returns(end)()
        assert isinstance(caught.value, RobbenchError)
    with pytest.raises(typer.Exit) as ended:
        _count_as_done_if_it_returns(raising(typer.Exit(1)))()
    assert ended.value.exit_code == 1
    with pytest.raises(KeyboardInterrupt):
        _count_as_done_if_it_returns(raising(KeyboardInterrupt()))()


@pytest.mark.parametrize("text", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise GeneratorExit"])
@pytest.mark.parametrize("command", ["check", "baseline", "eval", "reproduce"])
def test_a_module_that_ends_the_process_as_it_is_imported(tmp_path, monkeypatch, text, command):
    (tmp_path / "ends.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    args = {"check": ["--baseline", "b.json"], "baseline": ["--out", "b.json"], "eval": [], "reproduce": ["r"]}[command]
    done = CliRunner().invoke(app, [command, *args, "--import", "ends"])
    assert isinstance(done.exception, RobbenchError) and "--import ends: " in str(done.exception), done.output
    sys.modules.pop("ends", None)


def test_exits_pass_outside_of_the_blocks_and_in_forked_processes():
    before = os._exit
    with refuse_exits():
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert os._exit is before
    with pytest.raises(KeyboardInterrupt), contain_exits():
        raise KeyboardInterrupt
    with pytest.raises(RobbenchError, match="--import"):
        import_user_modules(["no_module_of_this_name"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exit_in_a_thread_ends_that_thread_alone(problem):
    import threading

    _, x, y = problem

    def end():
        thread = threading.Thread(target=sys.exit)
        thread.start()
        thread.join()

    result = evaluate(Ends(end).eval(), "quick", x=x[:10], y=y[:10], eps=0.05)
    assert result.n == 10 and torch.is_tensor(x)


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit(0)


class MovedByAnExit(Ends):
    def to(self, *args, **options):
        self.end()


@pytest.mark.parametrize("error", [*EXITS[:3], raising(Unprintable()), raising(ValueError("no"))])
def test_a_model_that_ends_the_process_as_it_is_moved(problem, error):
    _, x, y = problem
    with pytest.raises(ModelError, match="cannot be read, or moved to cpu"):
        evaluate(MovedByAnExit(error).eval(), "quick", x=x, y=y, eps=0.05)


def test_an_error_whose_text_ends_the_process_is_an_error(problem):
    _, x, y = problem
    with pytest.raises(ModelError, match="Unprintable was raised, whose text cannot be printed"):
        evaluate(Ends(raising(Unprintable())).eval(), "quick", x=x, y=y, eps=0.05)
    with pytest.raises(RobbenchError, match="Unprintable"):
        _count_as_done_if_it_returns(raising(Unprintable()))()
