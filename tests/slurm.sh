#!/usr/bin/env bash
# The sweep on a real Slurm: on Debian, as root, with the packages of the environment (python on the PATH).
# Installs Slurm, starts it on this machine alone, trains a small sweep as an array of two jobs, kills one of
# them, has the other one preempted and queued again, and compares the tables with those of an ordinary sweep.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d /tmp/slurm-test.XXXXXX)
export PYTHONNOUSERSITE=1 SLURM_CONF=$work/slurm.conf
sweep="-p task denoising -p size 14 -p train_images 1000 -p epochs 40"

say() { echo "== $*"; }

wait_for() { # what to say, seconds, command
    local what=$1 seconds=$2 start=$SECONDS
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS - start < seconds)) || { say "waited $seconds s in vain: $what"; exit 1; }
        sleep 0.5
    done
    say "$what, after $((SECONDS - start)) s"
}

started=()
stop() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait || true
    say "daemons stopped; logs and both stores are in $work"
}
trap stop EXIT

export DEBIAN_FRONTEND=noninteractive
if ! command -v slurmctld >/dev/null; then
    say "installing slurm-wlm"
    apt-get update -qq
    # The packages want to start services; here the daemons are started by hand.
    printf '#!/bin/sh\nexit 101\n' >"$work/policy-rc.d"
    [ -e /usr/sbin/policy-rc.d ] || install -m 755 "$work/policy-rc.d" /usr/sbin/policy-rc.d
    apt-get install -y -qq --no-install-recommends slurm-wlm munge >"$work/apt.log"
fi
say "$(slurmctld -V), $(nproc) cores"

cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
KillWait=5
JobRequeue=1
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=short Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
mkdir -p "$work/state" "$work/spool"
dd if=/dev/urandom of="$work/munge.key" bs=1024 count=1 status=none
chmod 600 "$work/munge.key"
chmod 755 "$work"
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
    --pid-file="$work/munged.pid" --seed-file="$work/munge.seed" --log-file="$work/munged.log" \
    2>"$work/munged.err" &
started+=($!)
wait_for "munged answers" 20 munge --socket="$work/munge.socket" --no-input
slurmctld -D 2>"$work/slurmctld.err" & started+=($!)
slurmd -D 2>"$work/slurmd.err" & started+=($!)
wait_for "the node is idle" 60 sh -c 'sinfo --noheader --format=%T | grep -qx idle'
sinfo

# Two copies of the repository, so that each has a store of its own.
for copy in plain jobs; do
    mkdir -p "$work/$copy"
    cp -r "$repository/lib" "$work/$copy/"
    ln -s "$repository/data" "$work/$copy/data"
done

say "an ordinary sweep"
(cd "$work/plain" && PYTHONPATH=$PWD nice -n 19 python -m lib.experiments run --profile smoke $sweep)

cd "$work/jobs"
export PYTHONPATH=$PWD
run="python -m lib.experiments run --profile smoke $sweep --cluster slurm --job jobs 2 --job partition short"

say "a partition that does not exist is one line"
if $run --job partition nowhere; then exit 1; fi

say "the sweep as an array of two jobs"
$run >first.out 2>first.err &
waiting=$!
some_checkpoints() { [ "$(ls results/runs/*/checkpoint.pt | wc -l)" -ge 3 ]; }
wait_for "both jobs have written checkpoints" 120 some_checkpoints
squeue --array
job=$(squeue --noheader --format=%A --states=R | sort -n | head -1)

say "kill -9 of the process of element 0; submitit's preemption signal to element 1"
element() { squeue --noheader --array --format="%i %A" | awk -v id="${job}_0" '$1 == id {print $2}'; }
scontrol listpids "$(element).0" | tee killed | sed -n 2p
kill -9 "$(awk 'NR == 2 {print $1}' killed)"
scancel --signal=USR2 "${job}_1"
requeued() { squeue --noheader --array --format="%i %T" | grep -q "_1 PENDING"; }
wait_for "element 1 was queued again" 60 requeued
squeue --array

say "a command for the runs of element 1 alone follows it, submits nothing, and Ctrl-C leaves it where it is"
python - $run -p model bilevel <<'END'
import signal, subprocess, sys, time
process = subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE, text=True)
time.sleep(15)
process.send_signal(signal.SIGINT)
print("said:", process.communicate()[1].splitlines()[-1])
print("exit status:", process.returncode)
END
squeue --array
[ "$(squeue --noheader --array --format=%i)" = "${job}_1" ]
# Slurm lets a job that is queued again wait for two minutes.
scontrol update "JobId=${job}_1" StartTime=now

say "the first command ends with the failure of element 0"
wait "$waiting" && exit 1 || say "exit status $?"
tr '\r' '\n' <first.err | tail -1
python -m lib.experiments status --profile smoke $sweep
grep -h -E "preempted|timed|Requeued" results/jobs/*/*_log.* || true

say "the same command resumes it; Slurm itself queues the job again, as when it preempts one"
nice -n 19 $run 2>second.err &
waiting=$!
running() { squeue --noheader --format=%T | grep -qx RUNNING; }
wait_for "the new job runs" 60 running
sleep 6
job=$(squeue --noheader --format=%A)
scontrol requeue "$job"
again() { scontrol show job "$job" | grep -q JobState=PENDING && scontrol show job "$job" | grep -q Restarts=1; }
wait_for "job $job was queued again" 60 again
scontrol update "JobId=$job" StartTime=now
wait "$waiting"

say "and a third time submits nothing"
$run
squeue --noheader | (! grep .)

say "the tables, without the seconds"
python - "$work" <<'END'
import sys
from pathlib import Path
import pandas as pd

work = Path(sys.argv[1])
for name in ("sweep_runs", "sweep_epochs"):
    one, other = (
        pd.read_csv(work / copy / "results" / "smoke" / f"{name}.csv", dtype=str).drop(columns="seconds")
        for copy in ("plain", "jobs")
    )
    assert one.to_csv() == other.to_csv(), f"{name} differs"
    print(f"{name}: {len(one)} rows, {len(one.to_csv())} bytes, equal")
END
