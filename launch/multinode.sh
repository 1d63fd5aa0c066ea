#!/usr/bin/env bash
# One llama_dist command over several machines. Type the same line on each of them, within ten minutes:
#   launch/multinode.sh --nnodes N --head HOST[:PORT] [--nproc_per_node M] [--job_id ID] COMMAND [--flag value ...]
#
#   --nnodes           how many machines there are
#   --head             one of them, by a name or address that all of them can reach, and a free port there (29400)
#   --nproc_per_node   ranks on this machine; by default its number of GPUs, or 1
#   --job_id           any word; jobs that share a head and port need different ones
#   --node_rank R      this machine's number, 0 on the head. Then the lines differ, and rank 0, who reads the input and
#                      writes the results, is on the head. Without it torchrun numbers the machines by address.
#
# Run it in the environment that llama_dist is installed in. The checkpoint, the input and the output must have the same
# paths on all machines; which of them writes is known only with --node_rank, so let the output be on a shared disk.
#
# Ports. The machines reach the head on its PORT. Everything else takes free ports: the ranks' store on the node of rank
# 0 (with --node_rank it is PORT too) and the connections of gloo and NCCL between all of them. A firewall between the
# machines must let them through: see `sysctl net.ipv4.ip_local_port_range` for which these are.
#
# Names. torchrun would tell the others this machine's own name (its FQDN), which they may not know, and would compare
# the head's name with its own to learn whether it is the head, which fails where Debian calls it 127.0.1.1. So this
# script asks which of the machine's addresses leads to the head, and passes that on. LOCAL_ADDR overrides it.
#
# Interfaces. llama_dist lets gloo use the interface that leads to the head. Where that is not the network to compute
# on, set the name on each machine:  export GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1
# NCCL looks for InfiniBand by itself; NCCL_IB_HCA and NCCL_DEBUG=INFO are its own settings.
#
# A machine that dies ends the job on all others with one line that names its ranks, a cut cable does after --timeout
# seconds. Then type the same lines again, on as many machines as there are left: `batch` goes on where it stopped.
# Without --node_rank, torchrun itself may wait for minutes on the far side of a cut cable when its ranks have ended:
# kill it. Its --max-restarts works on one machine only, so there is no flag for it here.
#
# Told to stop, torchrun ends all ranks and leaves with 1, whatever they say; after 30 seconds it kills them. This
# script leaves with their 75 (run me again) where the job's status file says that it was preempted.
set -euo pipefail

die() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

nnodes="" head="" nproc="" job_id="llama_dist" node_rank=""
words=()
while (($#)); do
    flag="${1%%=*}"
    case "${flag//-/_}" in
        __nnodes | __head | __nproc_per_node | __job_id | __node_rank)
            if [[ "$1" == *=* ]]; then
                value="${1#*=}" && shift
            else
                (($# > 1)) || die "$1 needs a value"
                value="$2" && shift 2
            fi
            case "${flag//-/_}" in
                __nnodes) nnodes="$value" ;;
                __head) head="$value" ;;
                __nproc_per_node) nproc="$value" ;;
                __job_id) job_id="$value" ;;
                __node_rank) node_rank="$value" ;;
            esac
            ;;
        *) words+=("$1") && shift ;;
    esac
done
whole() {
    if [[ ! "$2" =~ ^[0-9]+$ ]] || (($2 < $3)); then
        die "$1 is '$2', must be a whole number from $3"
    fi
}
whole --nnodes "$nnodes" 1
[[ -n "$head" ]] || die "--head is missing: give the address of one of the machines"
[[ -z "$node_rank" ]] || whole --node_rank "$node_rank" 0
: "${nproc:=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
whole --nproc_per_node "$nproc" 1
host="${head%:*}" port=29400
[[ "$head" != *:* ]] || port="${head##*:}"
whole "the port of --head" "$port" 1

if [[ -n "$node_rank" ]]; then
    meet=(--node-rank "$node_rank" --master-addr "$host" --master-port "$port")
else
    # This machine's address on the way to the head, and whether it is the head itself.
    found="$(python -c '
import os, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
try:
    target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(*target[:3]) as s:
        s.connect(target[4])
        mine = s.getsockname()[0]
except OSError as err:
    sys.exit(f"multinode.sh: --head {host}: {err.strerror}")
if int(sys.argv[3]) > 1 and mine.startswith("127.") and "LOCAL_ADDR" not in os.environ:
    sys.exit(f"multinode.sh: --head {host} is {mine} here, which the other machines cannot reach; give its address")
print(os.environ.get("LOCAL_ADDR", mine), int(target[4][0] == mine))
' "$host" "$port" "$nnodes")" || exit 2
    read -r address is_head <<<"$found"
    meet=(--rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$job_id")
    meet+=(--rdzv-conf "is_host=$is_head" --local-addr "$address")
fi

# With 1, torchrun keeps quiet about threads, and each rank takes its share of the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m torch.distributed.run --nnodes "$nnodes" --nproc_per_node "$nproc" "${meet[@]}" \
    -m llama_dist "${words[@]}" &
torchrun=$!
told=""
trap 'told=1; kill -TERM "$torchrun"' TERM
trap 'told=1; kill -INT "$torchrun"' INT
while :; do
    rc=0
    wait "$torchrun" || rc=$?
    [[ -n "$told" ]] || break # a signal ends this wait, not torchrun
    told=""
done
((rc)) || exit 0
output="" previous=""
for word in "${words[@]}"; do
    [[ "$previous" =~ ^--output[_-]file$ ]] && output="$word"
    [[ "$word" =~ ^--output[_-]file= ]] && output="${word#*=}"
    previous="$word"
done
grep -qs '"state": "preempted"' "$output.status.json" && exit 75
exit "$rc"
