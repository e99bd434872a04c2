#!/usr/bin/env bash
# slurmlab.sh up DIR [NODES] | down DIR
#
# A real Slurm on this host, as root, without systemd: one controller and NODES emulated nodes
# (default 2), in a second. `export SLURM_CONF=DIR/slurm.conf` then makes sbatch and the rest use it.
# Slurm's emulation of several nodes (slurmd -N) is in Debian's build. cred_expire is also how long a
# job that is queued again waits (120 s unless set); longer than KillWait, since the end of one start
# on a slow node may otherwise reach the next, whose steps have the same names.
# Its ports are SLURMLAB_PORT (26817) for the controller, and those after it for the nodes.
set -euo pipefail
what=${1:-} dir=${2:?usage: slurmlab.sh up DIR [NODES] | down DIR} nodes=${3:-2}
export SLURM_CONF=$dir/slurm.conf
port=${SLURMLAB_PORT:-26817}

down() {
    local file
    # What is left of jobs would live on without its daemons, and report to the next lab's. TERM
    # ends them, or KILL after KillWait.
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 700); do
        [ -n "$(timeout 10 squeue -h 2>/dev/null)" ] || break
        sleep 0.1
    done
    for file in "$dir"/run/slurmd.*.pid "$dir"/run/slurmctld.pid; do
        if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
    for _ in $(seq 100); do
        compgen -G "$dir/run/*.pid" >/dev/null || return 0
        sleep 0.1
    done
    # a daemon that was killed leaves its file
    rm -f "$dir"/run/*.pid
}

configure() {
    local host number
    host=$(hostname -s)
    for number in $(seq "$nodes"); do
        grep -qw "n$number" /etc/hosts || echo "127.0.0.1 n$number" >>/etc/hosts
    done
    cat >"$SLURM_CONF" <<C
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=30
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=${SLURMLAB_PARAMETERS:-preempt_send_user_signal}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=20
SlurmdTimeout=20
SlurmdParameters=config_overrides
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool.%n
StateSaveLocation=$dir/state
SlurmctldDebug=${SLURMLAB_DEBUG:-info}
SlurmdDebug=${SLURMLAB_DEBUG:-info}
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
$(for number in $(seq "$nodes"); do
        echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number)) CPUs=16 State=UNKNOWN"
    done)
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
C
}

up() {
    local number
    for number in $(seq 0 "$nodes"); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$((port + number))") 2>/dev/null; then
            echo "slurmlab: port $((port + number)) is taken, perhaps by another lab: end it, or set SLURMLAB_PORT" >&2
            return 1
        fi
    done
    mkdir -p "$dir"/state "$dir"/log "$dir"/run
    chmod 755 "$dir"
    configure
    [ -s /etc/munge/munge.key ] || mungekey -c
    mkdir -p /run/munge
    chown munge:munge /run/munge
    munge -n >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
    slurmctld
    for number in $(seq "$nodes"); do slurmd -N "n$number"; done
    # without a controller each sinfo waits for long
    local end=$((SECONDS + 30))
    while [ "$SECONDS" -lt "$end" ]; do
        [ "$(timeout 5 sinfo -h -p main -t idle -o %D 2>/dev/null)" != "$nodes" ] || return 0
        sleep 0.1
    done
    echo "slurmlab: the nodes are not idle" >&2
    tail -n 20 "$dir"/log/*.log >&2
    down
    return 1
}

case $what in
    up) up ;;
    down) down ;;
    *) echo "usage: slurmlab.sh up DIR [NODES] | down DIR" >&2; exit 2 ;;
esac
