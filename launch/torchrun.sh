#!/usr/bin/env bash
# One llama_dist command on the devices of this machine:
#   launch/torchrun.sh [--nproc_per_node N] COMMAND [--flag value ...]
# N defaults to the number of GPUs here, or 1. Several machines: launch/multinode.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

nproc=""
words=()
while (($#)); do
    case "$1" in
        --nproc_per_node | --nproc-per-node) nproc="${2:?--nproc_per_node needs a number}" && shift 2 ;;
        --nproc_per_node=* | --nproc-per-node=*) nproc="${1#*=}" && shift ;;
        *) words+=("$1") && shift ;;
    esac
done
ready_venv
: "${nproc:=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || die "--nproc_per_node is '$nproc', must be a whole number from 1"

# A mistyped flag is answered here in one line, before torchrun adds its own report of what each rank did.
rc=0
"$python" -c '
import sys
from llama_dist import cli
from llama_dist.errors import ConfigError
try:
    line = cli.parse(sys.argv[1:])
except ConfigError as err:
    print(f"llama_dist: error: {err}", file=sys.stderr)
    sys.exit(2)
if line.help is not None:
    print(line.help)
    sys.exit(100)
' "${words[@]}" || rc=$?
((rc == 100)) && exit 0
((rc == 0)) || exit "$rc"

# With 1, torchrun keeps quiet about threads, and each rank takes its share of the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$nproc" -m llama_dist "${words[@]}"
