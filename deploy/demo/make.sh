#!/usr/bin/env bash
# Makes the demo checkpoint: a small Swish LLaMA trained from scratch on Python's standard library, then ProSparse on it.
# Minutes on a data-centre GPU, days without one.
#
#   OUT=runs/demo deploy/demo/make.sh
#
# OUT          folder to create; the dense base goes to OUT-base and is kept   default: runs/demo
# CORPUS       stdlib, a folder of text, a .jsonl file or a text file          default: stdlib
# CORPUS_NAME  what the manifest calls the corpus                              default: made from CORPUS
# L1           weight of the L1 regulariser: higher is sparser                 default: 3e-4
# PYTHON       interpreter with torch, transformers, accelerate and pydantic   default: python3
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-runs/demo}
python=${PYTHON:-python3}
corpus=(--corpus "${CORPUS:-stdlib}")
if [[ -n ${CORPUS_NAME:-} ]]; then
    corpus+=(--corpus-name "$CORPUS_NAME")
fi

if [[ ! -d $out-base ]]; then
    "$python" -m sparse_backend.prosparse.pretrain "$out-base" --preset demo --tokens 100000000 "${corpus[@]}"
fi
"$python" -m sparse_backend.prosparse.job "$out-base" "$out" "${corpus[@]}" \
    --recipe demo --l1 "${L1:-3e-4}"
