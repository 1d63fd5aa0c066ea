#!/usr/bin/env bash
# A small real model answers questions, on two ranks of this machine; no GPU needed:
#   launch/quickstart.sh [--nproc_per_node N] [--prompt "..."] [any flag of `llama_dist generate`]
# The first run makes .venv and downloads the model (SmolLM2-135M-Instruct, 100 MB); later ones download nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Whether the user gave one of these flags, in any spelling.
given() {
    local word name
    for word in "${@:2}"; do
        word="${word%%=*}"
        for name in $1; do
            [[ "${word//-/_}" == "__$name" ]] && return 0
        done
    done
    return 1
}

ready_venv
flags=(--chat)
if ! given "ckpt_dir" "$@"; then
    model="$("$python" "$root/launch/fetch_smollm2.py")"
    flags+=(--ckpt_dir "$model")
fi
given "nproc_per_node" "$@" || flags+=(--nproc_per_node 2)
given "temperature" "$@" || flags+=(--temperature 0)
given "max_gen_len" "$@" || flags+=(--max_gen_len 96)
given "max_seq_len" "$@" || flags+=(--max_seq_len 1024)
given "prompt prompts_file" "$@" || flags+=(
    --prompt "What is the capital of France?"
    --prompt "Why is the sky blue? Answer in two sentences."
    --prompt "Write one sentence about the sea."
    --prompt "What do bees make?"
)
exec "$root/launch/torchrun.sh" generate "${flags[@]}" "$@"
