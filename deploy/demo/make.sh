#!/usr/bin/env bash
# Makes the demo checkpoint: a small Swish LLaMA trained from scratch on Python's standard library, then ProSparse on it.
# One data-centre GPU: about ten minutes. Without a GPU: days.
#
#   OUT=runs/demo deploy/demo/make.sh
#
# OUT     folder to create (the dense base goes to OUT-base)            default: runs/demo
# CORPUS  text to train on: stdlib, a folder, a .jsonl or text file     default: stdlib
# CORPUS_NAME  what the manifest calls it                               default: made from CORPUS
# L1      weight of the L1 regulariser: higher is sparser               default: 1.5e-4
# PYTHON  interpreter with torch, transformers, accelerate              default: python3
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-runs/demo}
python=${PYTHON:-python3}
corpus=(--corpus "${CORPUS:-stdlib}")
if [[ -n ${CORPUS_NAME:-} ]]; then
    corpus+=(--corpus-name "$CORPUS_NAME")
fi
mkdir -p "$(dirname "$out")"

if [[ ! -d $out-base ]]; then
    "$python" -m sparse_backend.prosparse.pretrain "$out-base" --preset demo "${corpus[@]}"
fi
"$python" -m sparse_backend.prosparse.job "$out-base" "$out" "${corpus[@]}" \
    --tokens 100000000 --context 2048 --batch 32 --learning-rate 1e-3 --l1 "${L1:-1.5e-4}"
