#!/usr/bin/env bash
# Runs tests/hf with other releases than the pinned ones, each in a folder of its own; the environment stays as it is:
#
#   bash scripts/try_hugging_face.sh 4.57.6 [PYTEST ARGUMENTS]
#   bash scripts/try_hugging_face.sh 5.16.1 [PYTEST ARGUMENTS]
#   bash scripts/try_hugging_face.sh axolotl      trains through Axolotl's own command line
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

OLDER=(transformers==4.57.6 accelerate==1.12.0 huggingface_hub==0.36.0 tokenizers==0.22.1
    datasets==4.4.1 httpx httpcore h11 anyio sniffio)
OLD=(transformers==5.16.1 accelerate==1.13.0 huggingface_hub==1.17.0 tokenizers==0.23.1 peft==0.20.0 trl==1.9.0
    datasets==4.8.4 httpx httpcore h11 anyio sniffio)
# Without what only GPUs and other services use.
AXOLOTL=(axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 evaluate==0.4.1
    optimum==1.16.2 pydantic==2.12.5 pydantic_core==2.41.5 typer==0.25.1 posthog==6.7.11 schedulefree==1.4.1 addict
    backoff bitsandbytes colorama distro einops fire llvmlite numba platformdirs python-dotenv scipy sentencepiece six
    termcolor triton wandb opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions)
TESTS=(batch experts parity refusals traps trainer) # of tests/hf

what=${1:-}
case "$what" in
    4.57.6) packages=("${OLDER[@]}") ;;
    5.16.1) packages=("${OLD[@]}") ;;
    axolotl) packages=("${OLD[@]}" "${AXOLOTL[@]}") ;;
    *) die "unknown release: '$what'" "bash scripts/try_hugging_face.sh 4.57.6|5.16.1|axolotl" ;;
esac
shift

bash "$ROOT/scripts/setup_env.sh" --dev
use_env
cd "$ROOT"
folder=$ROOT/build/hugging-face-$what
if [ ! -f "$folder/complete" ]; then
    rm -rf "$folder"
    # Their own requirements would bring another torch; those that are pinned are in the environment already.
    python -m pip install --disable-pip-version-check -q --no-deps --target "$folder" "${packages[@]}"
    touch "$folder/complete"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$what" = axolotl ]; then
    LIGHTSEQ_AXOLOTL=$folder exec python -m pytest tests/hf/test_axolotl.py "$@"
fi
files=("${TESTS[@]/#/tests/hf/test_}")
PYTHONPATH=$ROOT:$folder exec python -m pytest "${files[@]/%/.py}" "$@"
