#!/usr/bin/env bash
# A throw-away Slurm cluster on this machine, for tests: several nodes with make-believe GPUs, no accounting.
#
#   start_slurm.sh install      the Debian packages, where they are missing (needs root)
#   start_slurm.sh start DIR    munged, slurmctld and one slurmd a node; `source DIR/env.sh` to use it
#   start_slurm.sh node DIR N   the slurmd of node N again, after it died
#   start_slurm.sh stop DIR     cancels all jobs and stops exactly these daemons
#   start_slurm.sh guard DIR PID   waits until process PID is gone, however it ended, then stops
#
# Any user may run it. All daemons belong to that user; every socket, key, log and pid file is in DIR; nothing in /etc,
# /run or /var is read or written; no systemd, cgroups or DNS; loopback only. Several can run beside each other if they
# differ in DIR and SLURM_TEST_PORT.
#
#   SLURM_TEST_NODES          nodes (default 4)
#   SLURM_TEST_PORT           first TCP port; as many more as there are nodes are used (default 26817)
#   SLURM_TEST_NODE_TIMEOUT   seconds until a silent node counts as lost (default 60)
#   SLURM_TEST_WARN_PREEMPTED true: a preempted job gets its own --signal, else SIGTERM (default true)
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

readonly NODES=${SLURM_TEST_NODES:-4}
readonly PORT=${SLURM_TEST_PORT:-26817}
readonly NODE_TIMEOUT=${SLURM_TEST_NODE_TIMEOUT:-60}
readonly WARN_PREEMPTED=${SLURM_TEST_WARN_PREEMPTED:-true}
readonly GPUS=8
readonly START_TIMEOUT_S=80
ROOT=${2:-}

main() {
    local command=${1:-}
    case $command in
        install) install_packages ;;
        start | stop | node | guard)
            [[ -n $ROOT ]] || die "name a directory: start_slurm.sh $command DIR"
            case $command in
                start) start ;;
                node) start_node "${3:?which node}" ;;
                stop) stop ;;
                guard)
                    while kill -0 "${3:?which process}" 2>/dev/null; do sleep 1; done
                    stop
                    ;;
            esac
            ;;
        *)
            sed -n '2,19p' "$0"
            exit 2
            ;;
    esac
}

install_packages() {
    local name missing="" packages=(munge slurmctld slurmd slurm-client shellcheck)
    for name in munged slurmctld slurmd sbatch shellcheck; do
        command -v "$name" >/dev/null || missing=$name
    done
    [[ -n $missing ]] || return 0
    [[ $(id -u) -eq 0 ]] || die "no $missing here, and only root can: apt-get install ${packages[*]}"
    command -v apt-get >/dev/null || die "no $missing here, and no apt-get to install it"
    timeout 300 apt-get update -qq
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

start() {
    local i
    mkdir -p "$ROOT"/{munge,controller,log,devices}
    chmod 0700 "$ROOT/munge"
    write_configuration
    # shellcheck disable=SC1091
    source "$ROOT/env.sh"
    (umask 077 && head -c 128 /dev/urandom >"$ROOT/munge/munge.key")
    # --force: munged dislikes sockets below /tmp and running as root; both are fine here
    munged --force --key-file="$ROOT/munge/munge.key" --socket="$ROOT/munge/munge.socket" \
        --pid-file="$ROOT/munge/munged.pid" --log-file="$ROOT/log/munged.log" \
        --seed-file="$ROOT/munge/munged.seed" --num-threads=2 2>>"$ROOT/log/munged.log" || die "munged: $(tail -n3 "$ROOT/log/munged.log")"
    chmod 0711 "$ROOT/munge"
    slurmctld -c -i 2>>"$ROOT/log/slurmctld.log" || die "slurmctld: $(tail -n5 "$ROOT/log/slurmctld.log")"
    for ((i = 1; i <= NODES; i++)); do
        start_node "$i"
    done
    wait_for_nodes
}

start_node() {
    # shellcheck disable=SC1091
    source "$ROOT/env.sh"
    mkdir -p "$ROOT/node$1/spool"
    slurmd -N "node$1" 2>>"$ROOT/log/slurmd-node$1.log" || die "slurmd of node$1: $(tail -n5 "$ROOT/log/slurmd-node$1.log")"
}

wait_for_nodes() {
    local up=0 end=$((SECONDS + START_TIMEOUT_S))
    while ((SECONDS < end)); do
        up=$(sinfo -h -N -p batch -t idle,mix,alloc -o %N 2>/dev/null | wc -l)
        ((up >= NODES)) && return
        sleep 0.1
    done
    die "only $up of $NODES nodes are up: $(tail -n10 "$ROOT/log/slurmctld.log")"
}

write_configuration() {
    local i user host
    user=$(id -un)
    host=$(hostname -s)
    {
        cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits until its credential has expired: 120 s by default
AuthInfo=socket=$ROOT/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$ROOT/controller
SlurmctldPidFile=$ROOT/controller/slurmctld.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdPidFile=$ROOT/%n/slurmd.pid
SlurmdSpoolDir=$ROOT/%n/spool
SlurmdLogFile=$ROOT/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=100000
# The nodes' cores and memory are made up: they are not compared with the machine's
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=7200
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=$NODE_TIMEOUT
TreeWidth=64
MessageTimeout=20
LaunchParameters=enable_nss_slurm
GresTypes=gpu
CONF
        [[ $WARN_PREEMPTED != true ]] || echo "SlurmctldParameters=preempt_send_user_signal"
        for ((i = 1; i <= NODES; i++)); do
            echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + i)) CPUs=8 RealMemory=4096 Gres=gpu:$GPUS State=UNKNOWN"
        done
        echo "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 DefMemPerNode=256 PriorityTier=1 PreemptMode=REQUEUE GraceTime=150 State=UP"
        echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 DefMemPerNode=256 PriorityTier=10 PreemptMode=OFF State=UP"
    } >"$ROOT/slurm.conf"
    # Links to /dev/null stand in for /dev/nvidiaN: without cgroups slurmd only looks whether they are character devices
    for ((i = 0; i < GPUS; i++)); do
        ln -sfn /dev/null "$ROOT/devices/nvidia$i"
    done
    echo "NodeName=node[1-$NODES] AutoDetect=off Name=gpu File=$ROOT/devices/nvidia[0-$((GPUS - 1))]" >"$ROOT/gres.conf"
    : >"$ROOT/plugstack.conf"
    cat >"$ROOT/env.sh" <<ENV
export SLURM_CONF=$ROOT/slurm.conf
export MUNGE_SOCKET=$ROOT/munge/munge.socket
ENV
}

stop() {
    local folder i
    if [[ -f $ROOT/env.sh ]]; then
        # shellcheck disable=SC1091
        source "$ROOT/env.sh"
        timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
        for ((i = 0; i < 80; i++)); do # their steps end the tasks
            [[ -z $(timeout 5 squeue -h -t R,CG,S 2>/dev/null) ]] && break
            sleep 0.1
        done
    fi
    for folder in "$ROOT"/node*/; do
        end_daemon "${folder}slurmd.pid" slurmd
    done
    end_daemon "$ROOT/controller/slurmctld.pid" slurmctld
    end_daemon "$ROOT/munge/munged.pid" munged
}

end_daemon() { # PIDFILE NAME: only a process of that name, as the number may be another's by now
    local pid i
    [[ -s $1 ]] || return 0
    pid=$(<"$1")
    is_running "$pid" "$2" && kill -TERM "$pid"
    for ((i = 0; i < 100; i++)); do
        is_running "$pid" "$2" || break
        sleep 0.05
    done
    if is_running "$pid" "$2"; then
        kill -KILL "$pid"
    fi
    rm -f "$1"
}

is_running() {
    [[ $(cat "/proc/$1/comm" 2>/dev/null) == "$2"* ]] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null
}

die() {
    echo "start_slurm: $*" >&2
    exit 1
}

main "$@"
