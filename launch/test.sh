#!/usr/bin/env bash
# Sets up what the tests need, then checks style and types and runs them all:
#   launch/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

ready_venv test
cd "$root"
# Real tokenizers and a small model, fetched once; without network the tests that want them are skipped.
"$python" -m tests.assets >/dev/null || [[ "${CI:-}" != true ]] || die "the tests' files could not be fetched"
# A Slurm of the tests' own; without it those tests are skipped.
ready_commands "slurmctld slurmd munged pkill" slurm-wlm munge procps || [[ "${CI:-}" != true ]] || die "Slurm could not be installed"
# AVX-512 for processors without it.
ready_commands /usr/include/simde/x86/avx512.h libsimde-dev || [[ "${CI:-}" != true ]] || die "SIMDe could not be installed"
"$python" -m ruff check llama_dist tests launch
"$python" -m ruff format --check -q llama_dist tests launch
"$python" -m mypy
# A file stays on one worker: its tests share what is costly to make.
exec "$python" -m pytest -n 2 --dist loadfile "$@"
