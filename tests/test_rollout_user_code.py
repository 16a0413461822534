"""Code that is not ours: it is stopped wherever it waits, and what it changes in the process is put back."""

from __future__ import annotations

import asyncio
import contextlib
import locale
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from stages.errors import RewardError, StopRequested
from stages.models.tokens import PromptRow
from stages.rollout import user_code
from stages.rollout.reward_sources import call_function
from stages.rollout.reward_specs import RewardSpec, load_function
from stages.training.children import descendants, end_children
from stages.training.signals import Signals
from tests.marks import full

TEXTS = ["4", " three"]
FOREVER = 1000
fork = multiprocessing.get_context("fork")
waiting: list = []  # of one test: an event that is set once the function waits


def rows():
    question = [{"role": "user", "content": "three?"}]
    return [
        PromptRow(torch.tensor([1, 20, 21]), "two and two?", 2, {"answer": {"is": ["4"]}}, "p.jsonl:1"),
        PromptRow(torch.tensor([1, 22]), question, 6, {"answer": {"is": ["3"]}}, "p.jsonl:2"),
    ]


def call(function, timeout=0, signals=None):
    spec = RewardSpec("f.py", 1.0, None, function, "")
    return call_function(spec, rows(), TEXTS, signals or Signals(), timeout=timeout).tolist()


def refused(function, timeout=0):
    with pytest.raises(RewardError) as caught:
        call(function, timeout)
    assert caught.value.where == "--reward f.py" and caught.value.fix and "\n" not in caught.value.what
    return caught.value.what


@pytest.fixture
def begun(monkeypatch):
    """Set, by whichever process, once a function waits; interrupted again after a moment, and nothing is left."""
    monkeypatch.setattr(user_code, "RING_AGAIN", 0.1)
    waiting[:] = [fork.Event(), threading.Event()]
    yield waiting[0]
    waiting[1].set()
    end_children()


@contextlib.contextmanager
def signal_once(begun, number=signal.SIGTERM):
    """Send this process a signal as soon as a function waits."""
    thread = threading.Thread(target=lambda: begun.wait(20) and os.kill(os.getpid(), number))
    thread.start()
    yield
    thread.join()


# --- a signal while it waits


def sleep(_=None):
    waiting[0].set()
    time.sleep(FOREVER)


def in_a_pool():
    with fork.Pool(2) as pool:
        pool.map(sleep, [0, 1])


def in_an_executor():
    with ProcessPoolExecutor(1, mp_context=fork) as executor:  # its end waits for its workers
        list(executor.map(sleep, [0]))


def in_a_thread():
    with ThreadPoolExecutor(1) as executor:
        executor.submit(lambda: waiting[0].set() or waiting[1].wait(30)).result()


def in_a_subprocess():
    waiting[0].set()
    subprocess.run(["sleep", str(FOREVER)], check=True)


def in_a_forked_child():
    child = os.fork()
    if child == 0:
        sleep()
    os.waitpid(child, 0)


def in_a_coroutine():
    async def wait():
        waiting[0].set()
        await asyncio.sleep(FOREVER)

    asyncio.run(wait())


def turned_into_another():
    try:
        sleep()
    except BaseException as error:
        raise ValueError("it went wrong") from error


def swallowed():
    with contextlib.suppress(BaseException):
        sleep()


WAITS = [
    in_a_pool, in_an_executor, in_a_thread, in_a_subprocess, in_a_forked_child, in_a_coroutine, sleep,
    turned_into_another, swallowed,
]  # fmt: skip


@pytest.mark.parametrize("listening", [True, *full(False)])
@pytest.mark.parametrize("waits", WAITS)
def test_a_signal_ends_it_wherever_it_waits(waits, listening, begun):
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    signals = Signals()
    with signals.listening() if listening else contextlib.nullcontext():
        with signal_once(begun), pytest.raises(StopRequested) as caught:
            call(lambda prompts, responses: waits() or [0.0, 0.0], signals=signals)
        assert signals.received == (signal.SIGTERM if listening else None)
    assert (caught.value.number, caught.value.exit_code, caught.value.immediate) == (15, 143, False)
    assert before == {number: signal.getsignal(number) for number in signal.valid_signals()}


@pytest.mark.parametrize("waits", [in_a_pool, in_an_executor, in_a_thread, in_a_subprocess, sleep])
def test_a_time_limit_ends_it_wherever_it_waits(waits, begun, monkeypatch):
    monkeypatch.setattr("stages.rollout.reward_sources.CULPRIT_SECONDS", 0.2)
    said = refused(lambda prompts, responses: waits(), timeout=0.2)
    assert said.startswith("it took longer than 0.2 seconds for 2 responses")


def test_a_time_limit_holds_where_the_function_has_alarms_of_its_own(monkeypatch):
    """As verifiers of mathematics have: their handler and their alarm stand where ours would."""
    monkeypatch.setattr("stages.rollout.reward_sources.CULPRIT_SECONDS", 0.1)

    def ring(number, frame):
        raise TimeoutError

    def score(prompts, responses):
        for _ in range(1000):
            signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with contextlib.suppress(TimeoutError):
                time.sleep(FOREVER)

    before = signal.getsignal(signal.SIGALRM)
    assert "longer than 0.1 seconds" in refused(score, timeout=0.1)
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_alarm_that_it_leaves_behind_does_not_ring():
    before = signal.getitimer(signal.ITIMER_REAL)[0] > 0

    def score(prompts, responses):
        signal.setitimer(signal.ITIMER_REAL, 300)
        return [1.0, 2.0]

    assert call(score) == [1.0, 2.0]
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == before


def test_a_rank_that_others_wait_for_only_notes_the_signal(begun):
    def score(prompts, responses):
        os.kill(os.getpid(), signal.SIGTERM)
        return [1.0, 2.0]

    signals = Signals()
    with signals.listening(lambda: False):
        assert call(score, signals=signals) == [1.0, 2.0] and signals.received == signal.SIGTERM


# --- processes that it starts


def dispositions(_=None):
    return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, user_code.RING)]


def test_forked_children_have_the_handlers_of_before():
    """A worker that only noted SIGTERM would never end."""
    before, found = dispositions(), []
    before[2] = signal.getsignal(signal.SIGALRM)

    def score(prompts, responses):
        with fork.Pool(1) as pool:
            found.append(pool.apply(_same_as, (len(before),)))
        return [0.0, 0.0]

    signals = Signals()
    with signals.listening():
        call(score, signals=signals)
    assert found == [[handler is signal.SIG_DFL for handler in before]]


def _same_as(_):
    return [handler is signal.SIG_DFL for handler in dispositions()]


def test_a_child_that_comes_out_of_the_function_ends_there(tmp_path):
    here = os.getpid()

    def score(prompts, responses):
        child = os.fork()
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        return [float(child > 0), 0.0]

    assert call(score) == [1.0, 0.0] and os.getpid() == here


def test_what_was_started_ends_with_its_own_children():
    line = "import subprocess, sys; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE, text=True) as parent:
        grandchild = int(parent.stdout.readline())
        assert {parent.pid, grandchild} <= set(descendants(os.getpid()))
        end_children()
        assert not {parent.pid, grandchild} & set(descendants(os.getpid()))


def test_a_process_with_a_session_of_its_own_stays():
    with subprocess.Popen(["sleep", str(FOREVER)], start_new_session=True) as server:
        end_children()
        assert server.poll() is None
        server.kill()


@pytest.mark.parametrize("code", [0, 2])
def test_what_a_function_leaves_ends_with_the_command_however_that_ends(code, tmp_path):
    (tmp_path / "f.py").write_text(
        "import os, subprocess\n"
        "child = subprocess.Popen(['sleep', '1000']).pid\n"
        "orphan = subprocess.run('sleep 1000 >&- & echo $!', shell=True, stdout=-1, text=True).stdout.strip()\n"
        "server = subprocess.Popen(['sleep', '1000'], start_new_session=True).pid\n"
        "print(child, orphan, server, flush=True)\n"
        "def score(prompts, responses): return [1.0]\n"
    )
    line = (
        "import sys\nfrom rlhf_cli.program import leave\nfrom stages.rollout.reward_specs import load_function\n"
        f"load_function(sys.argv[1], '--reward')\nleave({code})\n"
    )
    with open(tmp_path / "said", "w") as said:
        ended = subprocess.run([sys.executable, "-c", line, tmp_path / "f.py"], stdout=said, start_new_session=True)
    *gone, server = map(int, (tmp_path / "said").read_text().split())
    os.kill(server, signal.SIGKILL)  # it was there
    assert ended.returncode == code and len(gone) == 2
    for process in gone:
        with pytest.raises(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_the_cleaner_of_multiprocessing_is_left_to_clean_up():
    """It ignores SIGTERM, and what it was to free would stay if it were killed."""
    line = (
        "import multiprocessing, time\nfrom multiprocessing import resource_tracker\n"
        "from stages.training.children import descendants, end_children\n"
        "lock = multiprocessing.get_context('spawn').Lock()\n"
        "began = time.monotonic(); end_children()\n"
        "assert time.monotonic() - began < 0.9\n"
        "assert descendants(multiprocessing.process.os.getpid()) == [resource_tracker._resource_tracker._pid]\n"
    )
    ended = subprocess.run([sys.executable, "-c", line], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


# --- what it changes


def settings():
    return {
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "filters": list(warnings.filters),
        "locale": locale.setlocale(locale.LC_ALL),
        "recursion": sys.getrecursionlimit(),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "benchmark": torch.backends.cudnn.benchmark,
        "wakeup": signal.set_wakeup_fd(-1),
        "lasting device": torch.get_default_device(),
    }


held = []


def hold(context):
    """Enter a context and never leave it."""
    held.append(context)
    context.__enter__()


def fail_on(flag):
    raise ValueError("after the change")


CHANGES = {
    "os.chdir": lambda: os.chdir("/"),
    "os.environ": lambda: os.environ.update(RANK="3", RLHF_NEW="x"),
    "os.environ.clear": lambda: os.environ.clear(),
    "sys.path": lambda: sys.path.clear(),
    "warnings": lambda: warnings.simplefilter("error"),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8" if "UTF" not in locale.setlocale(0) else "C"),
    "recursion": lambda: sys.setrecursionlimit(5000),
    "SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "SIGINT": lambda: signal.signal(signal.SIGINT, lambda *_: None),
    "SIGALRM": lambda: signal.signal(signal.SIGALRM, lambda *_: None),
    "SIGCHLD": lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "no_grad": lambda: hold(torch.no_grad()),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    "wakeup": lambda: signal.set_wakeup_fd(-1),
}


@pytest.mark.parametrize("fails", [True, *full(False)])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_function_changes_is_put_back(change, fails):
    before = settings()

    def score(prompts, responses):
        CHANGES[change]()
        return fail_on(change) if fails else [1.0, 2.0]

    if fails:
        refused(score)
    else:
        assert call(score) == [1.0, 2.0]
    assert settings() == before
    held.clear()


@pytest.mark.parametrize("change", CHANGES)
def test_what_importing_a_file_changes_is_put_back(change, tmp_path):
    before = settings()
    path = tmp_path / "f.py"
    path.write_text(
        "from tests.test_rollout_user_code import CHANGES\n"
        f"CHANGES[{change!r}]()\n"
        "def score(prompts, responses): return [1.0] * len(responses)\n"
    )
    assert call(load_function(str(path), "--reward")) == [1.0, 1.0]
    assert settings() == before
    held.clear()


def test_functions_find_what_importing_their_file_made_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_OLD", "x")
    (tmp_path / "lazy.py").write_text("VALUE = 7.0\n")
    (tmp_path / "notes.txt").write_text("3.0")
    path = tmp_path / "f.py"
    path.write_text(
        "import os, sys\n"
        "os.chdir(os.path.dirname(__file__)); os.environ['RLHF_NEW'] = '2'; del os.environ['RLHF_OLD']\n"
        "def score(prompts, responses):\n"
        "    import lazy\n"
        "    assert 'RLHF_OLD' not in os.environ\n"
        "    os.chdir('/')\n"
        "    return [lazy.VALUE, float(os.environ['RLHF_NEW'])]\n"
        "def read(prompts, responses):\n"
        "    return [float(open('notes.txt').read())] * 2\n"
    )
    here, score = os.getcwd(), load_function(str(path), "--reward")
    assert call(score) == call(score) == [7.0, 2.0]
    assert call(load_function(f"{path}:read", "--reward")) == [3.0, 3.0]
    assert os.getcwd() == here and "RLHF_NEW" not in os.environ and os.environ["RLHF_OLD"] == "x"


TORCH_AT_IMPORT = """
import torch
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
torch.set_float32_matmul_precision("medium")
def score(prompts, responses):
    made = torch.empty(0)
    numbers = [made.dtype == torch.float64 and made.device.type == "meta", not torch.is_grad_enabled()]
    numbers[0] &= torch.get_float32_matmul_precision() == "medium"
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(True)
    return [float(number) for number in numbers]
"""


def test_functions_find_what_importing_their_file_made_of_torch(tmp_path):
    before = settings()
    (tmp_path / "f.py").write_text(TORCH_AT_IMPORT)
    score = load_function(str(tmp_path / "f.py"), "--reward")
    assert settings() == before
    assert call(score) == call(score) == [1.0, 1.0]
    assert settings() == before


@pytest.mark.full
def test_also_where_their_file_is_the_first_to_import_torch(tmp_path):
    (tmp_path / "f.py").write_text(TORCH_AT_IMPORT)
    code = (
        "import sys\n"
        "from stages.rollout.reward_specs import load_function\n"
        "from stages.rollout.user_code import user_code\n"
        "from stages.training.signals import Signals\n"
        "assert 'torch' not in sys.modules\n"
        "score = load_function(sys.argv[1], '--reward')\n"
        "import torch\n"
        "def ours():\n"
        "    made = torch.empty(0)\n"
        "    precision = torch.get_float32_matmul_precision()\n"
        "    return made.dtype, made.device.type, torch.is_grad_enabled(), precision\n"
        "assert ours() == (torch.float32, 'cpu', True, 'highest'), ours()\n"
        "for _ in range(2):\n"
        "    with user_code('f.py', Signals(), score.imported):\n"
        "        assert score([], []) == [1.0, 1.0]\n"
        "    assert ours() == (torch.float32, 'cpu', True, 'highest'), ours()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "f.py"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_directory_that_is_gone_is_no_reason_to_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def score(prompts, responses):
        os.mkdir("inner")
        os.chdir("inner")
        os.rmdir("../inner")
        return [1.0, 2.0]

    assert call(score) == [1.0, 2.0] and os.getcwd() == str(tmp_path)


def test_random_numbers_go_on_from_call_to_call():
    """Nothing of ours draws from the global generators; a function that does shall not draw the same every time."""

    def score(prompts, responses):
        return [float(torch.rand(())), float(np.random.rand())]

    first, second = call(score), call(score)
    assert first[0] != second[0] and first[1] != second[1]


def test_what_it_does_to_its_arguments_stays_with_it():
    prompts = rows()

    def score(prompts, responses, answer):
        prompts[1][0]["content"] = "spoiled"
        answer[0]["is"].append("spoiled")
        answer.clear(), responses.clear(), prompts.clear()
        return [1.0, 2.0]

    call_function(RewardSpec("f.py", 1.0, None, score, ""), prompts, TEXTS, Signals())
    kept = [(row.text, row.columns) for row in prompts]
    assert kept == [(row.text, row.columns) for row in rows()] and TEXTS == ["4", " three"]


# --- files of one name, and processes that import them


def test_a_file_never_stands_in_for_a_module_of_its_name(tmp_path):
    for name in ("json", "colorsys", "no name"):
        (tmp_path / f"{name}.py").write_text("def score(prompts, responses): return [1.0, 2.0]\n")
        assert call(load_function(str(tmp_path / f"{name}.py"), "--reward")) == [1.0, 2.0]
    import colorsys

    assert hasattr(colorsys, "rgb_to_hsv")


def test_two_files_of_one_name_are_two_modules(tmp_path):
    functions = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "same_name_twice.py"
        path.write_text(
            "import pickle\ndef one(r): return r\n"
            "def score(prompts, responses):\n"
            f"    return [pickle.loads(pickle.dumps(one))(1.0) + {ord(folder)}, 0.0]\n"
        )
        functions.append(load_function(str(path), "--reward"))
    assert [call(function)[0] for function in functions] == [98.0, 99.0]


def test_workers_that_are_spawned_find_the_file(tmp_path):
    path = tmp_path / "spawning_reward.py"
    path.write_text(
        "import multiprocessing\n"
        "def length(text): return float(len(text))\n"
        "def score(prompts, responses):\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        return pool.map(length, responses)\n"
    )
    assert call(load_function(str(path), "--reward"), timeout=60) == [1.0, 6.0]


# --- what it raises


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Fatal(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (asyncio.CancelledError("gone"), "it raised CancelledError: gone"),
        (KeyboardInterrupt(), "it raised KeyboardInterrupt"),
        (GeneratorExit(), "it raised GeneratorExit"),
        (SystemExit(0), "it raised SystemExit: 0"),
        (Fatal("x"), "it raised Fatal: x"),
        (Unprintable(), "it raised Unprintable: (its text cannot be printed: RuntimeError)"),
        (BaseExceptionGroup("several", [Fatal("x")]), "it raised BaseExceptionGroup: several (1 sub-exception)"),
        (ValueError("two\nlines\r\nand more"), "it raised ValueError: two lines and more"),
        (MemoryError(), "it raised MemoryError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_it_raises_is_one_message(error, said):
    def score(prompts, responses):
        raise error

    assert refused(score) == f"{said} for the response '4' to 'two and two?' (p.jsonl:1)"


def test_long_words_are_cut():
    assert len(refused(lambda prompts, responses: fail_long())) < 700


def fail_long():
    raise ValueError("x" * 100_000)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "GeneratorExit", "SystemExit(3)", "Odd"])
def test_whatever_importing_raises_is_one_message(error, tmp_path):
    path = tmp_path / "f.py"
    path.write_text(f"class Odd(BaseException):\n    def __str__(self): return 1\nraise {error}\n")
    with pytest.raises(RewardError, match="importing it failed: ") as caught:
        load_function(str(path), "--reward")
    assert str(caught.value).count("\n") == 1 and f"({path}:3)" in caught.value.what


# --- what it returns


class Broken:
    """A value that raises whatever is asked of it."""

    def __init__(self, **broken):
        for name in broken:
            setattr(self, name, self._fail)

    def _fail(self, *_):
        raise RuntimeError("broken")


class BadFloat(float):
    def __abs__(self):
        raise RuntimeError("broken")

    def __le__(self, other):
        raise RuntimeError("broken")


class BadList(list):
    def __iter__(self):
        raise RuntimeError("broken")


class NoText:
    def __repr__(self):
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    "result",
    [
        [Decimal("1"), Fraction(-5, 2)],
        [torch.tensor(1.0), torch.tensor([-2.5])],
        [np.float16(1.0), np.array(-2.5)],
        torch.tensor([1.0, -2.5], dtype=torch.bfloat16),
        torch.tensor([1.0, -2.5], requires_grad=True),
        [torch.tensor(1.0, requires_grad=True, dtype=torch.bfloat16), -2.5],
        np.array([1.0, -2.5], dtype=object),
        [BadFloat(1.0), -2.5],
    ],
    ids=repr,
)
def test_numbers_of_other_kinds_are_taken(result):
    assert call(lambda prompts, responses: result) == [1.0, -2.5]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (Broken(tolist=1), "it returned a Broken that cannot be read: RuntimeError: broken"),
        (BadList([1.0, 2.0]), "it returned a BadList that cannot be read: RuntimeError: broken"),
        (torch.zeros(2, device="meta"), "it returned a Tensor that cannot be read: "),
        ({"a": 1.0, "b": 2.0}.values(), "it returned dict_values for 2 responses"),
        (range(2), "it returned range for 2 responses"),
        ({1.0, 2.0}, "it returned set for 2 responses"),
        ("12", "it returned str for 2 responses"),
        (b"12", "it returned bytes for 2 responses"),
        (torch.zeros(2, 1), "it returned [0.0] for the response '4'"),
        ([1.0, NoText()], "it returned a NoText that cannot be printed for the response ' three'"),
        ([1.0, np.bool_(True)], "it returned "),
        ([1.0, torch.tensor(float("nan"))], "it returned tensor(nan) for the response ' three'"),
        ([1.0, torch.zeros(3)], "it returned tensor([0., 0., 0.]) for the response ' three'"),
        ([1.0, Decimal("sNaN")], "it returned Decimal('sNaN') for the response ' three'"),
        ([1.0, 1j], "it returned 1j for the response ' three'"),
        ([1.0, 10**5000], "it returned a int that cannot be printed for the response ' three'"),
        ([1.0, "x" * 10_000], "it returned 'xxx"),
        ([1.0, Broken(item=1)], "it returned <tests."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_one_message(result, said):
    found = refused(lambda prompts, responses: result)
    assert found.startswith(said) and len(found) < 800
