"""benchmark.sh --slurm on a real SLURM of one machine (Debian: slurm-wlm, munge), started here, which takes root."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TOY_ID

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
FOUND = all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in DAEMONS)
pytestmark = pytest.mark.skipif(not FOUND or os.geteuid() != 0, reason="needs slurm-wlm and munge installed, and root")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
ReturnToService=2
KillWait=2
MaxArraySize=100
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition, what: str, timeout: float = 180):
    end = time.time() + timeout
    while not (found := condition()):
        assert time.time() < end, f"no {what} after {timeout} s"
        time.sleep(0.2)
    return found


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """munged, slurmctld and slurmd in the foreground, all their files in one temporary folder."""
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=ports))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    munge = {"key": "key-file", "socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
    munge = [f"--{option}={folder}/munge.{name}" for name, option in munge.items()]
    processes = []
    try:
        for command in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
            ["slurmd", "-D", "-N", host, "-f", str(folder / "slurm.conf")],
        ):
            with open(folder / f"{command[0]}.out", "w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, "munge socket", 20)
        wait_for(lambda: b"idle" in subprocess.run(["sinfo", "-h"], capture_output=True).stdout, "idle node", 60)
        yield
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)


def test_requeued_and_warned_runs_end_as_if_undisturbed(slurm, tmp_path, monkeypatch):
    """Of two runs of a job array, one is requeued by force mid-way, the other gets the warning that its time is up."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # the toy environment
    for name in ("benchmark.sh", "iql_finetune.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = f"./benchmark.sh --tasks {TOY_ID} --scripts iql_finetune --offline-steps 40 --online-steps 3000".split()
    command += ["--seeds", "1 2", "--workers", "2", "--sbatch", "--cpus-per-task=1"]
    extra = "--dataset official --hidden 16 --batch-size 32 --eval-every 250 --eval-episodes 2 --save-every 250"
    extra = ["--", *extra.split(), "--no-cuda"]

    def run(*words: str) -> str:
        done = subprocess.run([*command, *words, *extra], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    output = run("--run-dir", "runs/slurm", "--slurm")
    offline_id, online_id = output.split()[-2:]
    details = subprocess.run(["scontrol", "show", "job", online_id], capture_output=True, text=True).stdout
    assert f"Dependency=afterany:{offline_id}" in details, details
    again = subprocess.run([*command, "--run-dir", "runs/slurm", "--slurm", *extra], capture_output=True, text=True)
    assert again.returncode == 2 and "in the queue already" in again.stderr

    folders = [Path("runs/slurm", f"{TOY_ID.replace('/', '_')}__iql_finetune__{seed}") for seed in (1, 2)]
    for i, folder in enumerate(folders):
        wait_for((folder / "checkpoint.pt").exists, f"checkpoint of {folder}")
        assert not (folder / "summary.json").exists()
        disturb = ["scontrol", "requeue"] if i == 0 else ["scancel", "--signal=USR1", "--batch"]
        subprocess.run([*disturb, f"{online_id}_{i}"], check=True)

    def queue() -> str:
        return subprocess.run(["squeue", "-h", "-o", "%i %T"], capture_output=True, text=True).stdout

    wait_for(lambda: all((folder / "summary.json").exists() for folder in folders) and not queue(), "end", 400)
    assert "stopped and saved" in Path("runs/slurm/logs", f"{folders[1].name}.log").read_text()
    details = subprocess.run(["scontrol", "show", "job", online_id], capture_output=True, text=True).stdout
    assert details.count("Restarts=1") == 2 and details.count("JobState=COMPLETED") == 2, details

    run("--run-dir", "runs/here")  # undisturbed, without SLURM
    for folder in folders:
        ours = json.loads((folder / "summary.json").read_text())
        undisturbed = json.loads(Path("runs/here", folder.name, "summary.json").read_text())
        same = ("offline_score", "final_score", "lowest_score", "drop", "degradation_area", "regret", "steps_to_gain")
        assert {key: ours[key] for key in same} == {key: undisturbed[key] for key in same}
    assert run("--run-dir", "runs/slurm", "--dry-run") == ""
