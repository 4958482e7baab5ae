"""Several nodes, as torchrun agents on this machine; signals to stop; the SLURM script with stand-ins for SLURM."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import REPO, TINY, Result, command_environment
from titan_fp8.runtime.preemption import PREEMPTED, Preempted
from titan_fp8.trainer import Trainer

SCRIPT = REPO / "scripts" / "slurm_train.sh"
EXACT = [
    *("--training.global_batch_size", "4", "--training.local_batch_size", "2"),
    *("--training.mixed_precision_param", "float32"),
]
SAVING = ["--checkpoint.enable", "--checkpoint.interval", "1000", "--lr_scheduler.total_steps", "400"]
ENDLESS = ["--training.steps", "400"]

# Starts the command once a node, as srun does, and passes SIGUSR1 on, but to one node only: the others have to learn
# of it from that one, as in life from the first that hears it. Notes how it was called.
SRUN = """#!{python}
import os, signal, subprocess, sys
arguments = sys.argv[1:]
command = arguments[next(i for i, argument in enumerate(arguments) if not argument.startswith("--")):]
nodes = int(next(a for a in arguments if a.startswith("--nodes=")).split("=")[1])
tasks = [subprocess.Popen(command, env=dict(os.environ, SLURM_NODEID=str(node))) for node in range(nodes)]
signal.signal(signal.SIGUSR1, lambda *_: tasks[-1].send_signal(signal.SIGUSR1))
with open(os.environ["CALLS"], "a") as calls:
    print("srun", *arguments, file=calls)
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
case "$1 $2" in
  "show hostnames") for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo "${HOST:-node$node}"; done ;;
  "show job") echo "   JobId=$3 JobState=${STATE:-RUNNING} Reason=None" ;;
esac
"""


def _wait_for(what: Callable[[], bool], *children: subprocess.Popen, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert all(child.poll() is None for child in children), "a process ended early"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def _steps(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = stat.parent.name, stat.read_text().rpartition(") ")[2]
        except OSError:  # it has ended
            continue
        if int(rest.split()[1]) == parent:
            found.append(int(number))
    return found


def _stop(*children: subprocess.Popen) -> None:
    """End what a failed test has left; on SIGTERM a launcher ends its trainers too."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()


class _Agents:
    """Two calls of `run_train.sh` that are one run."""

    def __init__(self, tmp_path: Path, *options: str) -> None:
        self.folder = tmp_path / "run"
        (tmp_path / "defaults.toml").touch()
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.logs = [tmp_path / f"agent{node}.log" for node in range(2)]
        self.agents = [self._start(node, port, tmp_path / "defaults.toml", *options) for node in range(2)]

    def _start(self, node: int, port: int, config: Path, *options: str) -> subprocess.Popen:
        environment = command_environment(
            NNODES="2",
            NGPU="1",
            NODE_RANK=str(node),
            RDZV_ENDPOINT=f"localhost:{port}",
            RDZV_ID="test",
            CONFIG_FILE=str(config),
        )
        arguments = ["--job.dump_folder", str(self.folder), *TINY, *options]
        with self.logs[node].open("w") as log:
            return subprocess.Popen(
                ["bash", str(REPO / "run_train.sh"), *arguments],
                env=environment,
                cwd=REPO,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for_step(self, step: int) -> None:
        _wait_for(lambda: _steps(self.folder) >= step, *self.agents)

    def end(self) -> list[Result]:
        codes = [agent.wait(timeout=120) for agent in self.agents]
        return [Result(code, log.read_text(), self.folder) for code, log in zip(codes, self.logs, strict=True)]


@pytest.fixture
def start_agents(tmp_path: Path) -> Iterator[Callable[..., _Agents]]:
    started: list[_Agents] = []

    def start(*options: str) -> _Agents:
        started.append(_Agents(tmp_path, *options))
        return started[-1]

    yield start
    for pair in started:
        _stop(*[agent for agent in pair.agents if agent.poll() is None])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_agents_compute_what_one_with_two_processes_does(run_shell, start_agents) -> None:
    results = start_agents(*EXACT).end()
    assert [result.code for result in results] == [0, 0], results[0].output + results[1].output
    single = run_shell(*EXACT, folder="single", NGPU="2")
    assert single.code == 0, single.output
    assert len(single.losses) == 6
    assert results[0].losses == single.losses
    assert [line["grad_norm"] for line in results[0].lines] == [line["grad_norm"] for line in single.lines]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["USR1 to one trainer", "TERM to the agents"])
def test_a_signal_to_one_node_stops_all_at_one_step_and_the_run_goes_on(run_here, start_agents, case: str) -> None:
    agents = start_agents(*EXACT, *SAVING, *ENDLESS)
    agents.wait_for_step(2)
    if case == "USR1 to one trainer":
        (trainer,) = _children(agents.agents[1].pid)
        os.kill(trainer, signal.SIGUSR1)
        expected = [0, 0]
    else:
        # torchrun passes the signal on, waits for the trainers, and the command ends with it whatever they answer.
        for agent in agents.agents:
            agent.send_signal(signal.SIGTERM)
        expected = [143, 143]
    results = agents.end()
    output = results[0].output + results[1].output
    assert [result.code for result in results] == expected, output
    stopped = _steps(agents.folder)
    assert f"ended after step {stopped} of 400, which is saved" in output
    assert [path.name for path in (agents.folder / "checkpoint").iterdir()] == [f"step-{stopped}"]

    longer = [*EXACT, *SAVING, "--training.steps", str(stopped + 3)]
    resumed = start_agents(*longer).end()
    assert [result.code for result in resumed] == [0, 0], resumed[0].output + resumed[1].output
    assert f"going on after step {stopped}" in resumed[0].output + resumed[1].output
    whole = run_here(*longer, folder="whole")
    assert [line["step"] for line in resumed[0].lines] == list(range(1, stopped + 4))
    assert resumed[0].losses == pytest.approx(whole.losses, rel=1e-5)


def _signal_at_step(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    validate = Trainer._validate

    def signalled(trainer: Trainer, step: int) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        validate(trainer, step)

    monkeypatch.setattr(Trainer, "_validate", signalled)


@pytest.mark.parametrize("interval", ["1000", "3"], ids=["saved early", "saved when it was time anyway"])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_stopped_and_resumed_run_repeats_the_uninterrupted_one(run_here, tmp_path: Path, mode, interval) -> None:
    options = ["--checkpoint.enable", "--checkpoint.interval", interval, "--checkpoint.async_mode", mode]
    whole = run_here(*options, folder="whole")
    with pytest.MonkeyPatch.context() as patch:
        _signal_at_step(patch, 3)
        with pytest.raises(Preempted) as end:
            run_here(*options)
    assert end.value.code == PREEMPTED
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-3"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = run_here(*options)
    assert resumed.code == 0, resumed.output
    assert "going on after step 3" in resumed.output
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [line[key] for line in resumed.lines] == [line[key] for line in whole.lines]


def test_a_run_that_saves_nothing_says_so_and_is_not_to_be_started_again(run_here, monkeypatch, capfd) -> None:
    _signal_at_step(monkeypatch, 3)
    with pytest.raises(Preempted) as end:
        run_here()
    assert end.value.code == 1
    output = capfd.readouterr().err
    assert "ended after step 3 of 6; nothing is saved, because checkpoint.enable is off" in output
    assert "Traceback" not in output


def test_a_signal_at_the_last_step_changes_nothing(run_here, monkeypatch: pytest.MonkeyPatch) -> None:
    _signal_at_step(monkeypatch, 6)
    result = run_here("--checkpoint.enable")
    assert result.code == 0
    assert "asked to stop" not in result.output


class _Slurm:
    """A job of two nodes whose `srun` and `scontrol` are stand-ins, and a folder for what they were asked."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.programs = tmp_path / "programs"
        self.calls_file = tmp_path / "calls"
        self.children: list[subprocess.Popen] = []
        self.programs.mkdir()
        self.program("srun", SRUN.format(python=sys.executable))
        self.program("scontrol", SCONTROL)
        self.variables: dict[str, str | None] = {
            "SLURM_JOB_ID": "123457",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_SUBMIT_DIR": str(REPO),
            "CALLS": str(self.calls_file),
        }

    def program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def repository_with(self, run_train: str) -> str:
        """The path of a repository whose `run_train.sh` is this one."""
        repository = self.tmp_path / "repository"
        (repository / "scripts").mkdir(parents=True)
        shutil.copy(SCRIPT, repository / "scripts")
        (repository / "run_train.sh").write_text(run_train)
        return str(repository)

    def start(self, *arguments: str, **variables: str | None) -> subprocess.Popen:
        # SLURM runs a copy, so the script must not look for the repository around itself.
        copy = self.tmp_path / "slurm_script"
        shutil.copy(SCRIPT, copy)
        chosen = {name: value for name, value in {**self.variables, **variables}.items() if value is not None}
        environment = command_environment(**chosen)
        environment["PATH"] = str(self.programs) + os.pathsep + environment["PATH"]
        child = subprocess.Popen(
            ["bash", str(copy), *arguments],
            env=environment,
            cwd=self.tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.children.append(child)
        return child

    def run(self, *arguments: str, **variables: str | None) -> tuple[int, str]:
        child = self.start(*arguments, **variables)
        output, _ = child.communicate(timeout=120)
        return child.returncode, output

    @property
    def requeued(self) -> bool:
        return self.calls_file.exists() and "scontrol requeue 123457\n" in self.calls_file.read_text()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[_Slurm]:
    job = _Slurm(tmp_path)
    yield job
    _stop(*[child for child in job.children if child.returncode is None])


SHOW = 'echo "node $NODE_RANK of $NNODES, $NGPU each, $RDZV_ENDPOINT, id $RDZV_ID, $PET_RDZV_CONF, [$*]"\n'
# A launcher that ignores the warning, as torchrun does, and a trainer that takes its time to listen.
SLOW_START = """
python - <<'END'
import os, pathlib, signal, time
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
def stop(*_):
    pathlib.Path(os.environ["TITAN_FP8_PREEMPTED_FILE"]).touch()
    raise SystemExit
print("starting", flush=True)
time.sleep(2)
signal.signal(signal.SIGUSR1, stop)
time.sleep(60)
END
"""
PREEMPTED_AT_ONCE = 'touch "$TITAN_FP8_PREEMPTED_FILE"\n'


def test_every_node_learns_its_place_from_the_allocation(slurm: _Slurm) -> None:
    code, output = slurm.run("--training.steps", "3 4", SLURM_SUBMIT_DIR=slurm.repository_with(SHOW))
    assert code == 0, output
    place = "1 each, node0:13457, id 123457.0"
    assert f"node 0 of 2, {place}, is_host=1, [--training.steps 3 4]" in output
    assert f"node 1 of 2, {place}, is_host=0, [--training.steps 3 4]" in output
    assert not slurm.requeued


def test_a_requeued_job_gets_another_rendezvous_and_the_cpus_of_its_tasks(slurm: _Slurm) -> None:
    variables = {"SLURM_RESTART_COUNT": "2", "SLURM_CPUS_PER_TASK": "12"}
    code, output = slurm.run(SLURM_SUBMIT_DIR=slurm.repository_with(SHOW), **variables)
    assert code == 0, output
    assert "id 123457.2" in output
    assert "--cpus-per-task=12 bash" in slurm.calls_file.read_text()


@pytest.mark.parametrize(
    ("on_node", "per_node", "gpus"),
    [
        ("8", "gpu:4", "8"),
        (None, "8", "8"),
        (None, "gpu:8", "8"),
        (None, "h100:4", "4"),
        (None, "gpu:h100:8(S:0-1)", "8"),
        (None, "a100:2,h100:4", "6"),
    ],
)
def test_the_gpus_are_counted_in_every_form(slurm: _Slurm, on_node: str | None, per_node: str, gpus: str) -> None:
    variables = {"SLURM_GPUS_ON_NODE": on_node, "SLURM_GPUS_PER_NODE": per_node}
    code, output = slurm.run(SLURM_SUBMIT_DIR=slurm.repository_with(SHOW), **variables)
    assert code == 0, output
    assert f"node 0 of 2, {gpus} each" in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set, so this is no job; submit it: sbatch"),
        ({"SLURM_JOB_NODELIST": None}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM_GPUS_ON_NODE": None}, "the job has no GPUs; ask for some (sbatch --gpus-per-node=8), or set NGPU"),
        ({"SLURM_GPUS_ON_NODE": "many"}, "SLURM_GPUS_ON_NODE=many is no number of GPUs; set NGPU"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ has no run_train.sh; call sbatch in the repository or set TITAN_FP8_REPO"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_missing_is_one_line(slurm: _Slurm, variables: dict[str, str | None], message: str) -> None:
    code, output = slurm.run(**variables)
    assert code == 2
    assert output.startswith(f"slurm_train.sh: {message}")
    assert output.count("\n") == 1


def test_a_missing_program_is_one_line(slurm: _Slurm) -> None:
    (slurm.programs / "srun").unlink()
    code, output = slurm.run()
    assert code == 2
    assert output.startswith("slurm_train.sh: srun is not on PATH")


@pytest.mark.parametrize(
    ("run_train", "state", "code", "requeued"),
    [
        (PREEMPTED_AT_ONCE, "RUNNING", 0, True),
        (PREEMPTED_AT_ONCE + "exit 1\n", "RUNNING", 0, True),
        (PREEMPTED_AT_ONCE, "CANCELLED", 75, False),
        ("exit 0\n", "RUNNING", 0, False),
        ("exit 1\n", "RUNNING", 1, False),
        ("exit 2\n", "RUNNING", 2, False),
        ("exit 138\n", "RUNNING", 138, False),
    ],
    ids=["saved", "saved, and torchrun failed", "saved, but cancelled", "finished", "failed", "mistake", "strange"],
)
def test_only_a_saved_run_is_requeued(slurm: _Slurm, run_train: str, state: str, code: int, requeued: bool) -> None:
    found, output = slurm.run(SLURM_SUBMIT_DIR=slurm.repository_with(run_train), STATE=state)
    assert found == code, output
    assert slurm.requeued == requeued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_warning_before_anybody_listens_requeues_the_job(slurm: _Slurm, number: signal.Signals) -> None:
    slurm.program("srun", '#!/bin/bash\ntouch "$CALLS.started"\nexec sleep 60\n')
    child = slurm.start()
    _wait_for((slurm.tmp_path / "calls.started").exists, child)
    child.send_signal(number)
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 0, output
    assert slurm.requeued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_trainer_that_is_still_starting_hears_of_it_once_it_listens(slurm: _Slurm, number: signal.Signals) -> None:
    repository = slurm.repository_with(SLOW_START)
    node = slurm.start("--on-each-node", TITAN_FP8_REPO=repository, SLURM_NODEID="0")
    assert node.stdout is not None
    assert node.stdout.readline() == "starting\n"
    node.send_signal(number)
    node.communicate(timeout=30)
    assert node.returncode == PREEMPTED


@pytest.mark.timeout(300)
def test_the_job_saves_is_requeued_and_goes_on(slurm: _Slurm, run_here, tmp_path: Path) -> None:
    (tmp_path / "defaults.toml").touch()
    folder = tmp_path / "run"
    variables = {"CONFIG_FILE": str(tmp_path / "defaults.toml"), "HOST": "localhost"}
    options = ["--job.dump_folder", str(folder), *TINY, *EXACT, *SAVING]
    child = slurm.start(*options, *ENDLESS, **variables)
    _wait_for(lambda: _steps(folder) >= 2, child)
    child.send_signal(signal.SIGUSR1)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    assert slurm.requeued
    stopped = _steps(folder)
    assert f"ended after step {stopped} of 400, which is saved" in output

    slurm.calls_file.unlink()
    longer = ["--training.steps", str(stopped + 3)]
    code, output = slurm.run(*options, *longer, SLURM_RESTART_COUNT="1", **variables)
    assert code == 0, output
    assert f"going on after step {stopped}" in output
    assert not slurm.requeued
    whole = run_here(*EXACT, *SAVING, *longer, folder="whole")
    assert Result(0, "", folder).losses == pytest.approx(whole.losses, rel=1e-5)
