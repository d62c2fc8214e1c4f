#!/usr/bin/env bash
# Makes the demo checkpoint: a small Swish LLaMA trained from scratch on Python's standard library, then ProSparse on it.
# Minutes on a data-centre GPU, days without one. Interrupted, it goes on from the step it was in.
#
#   OUT=runs/demo deploy/demo/make.sh
#
# OUT             folder to create; the dense base goes to OUT-base and is kept   default: runs/demo
# CORPUS          stdlib, a folder of text, a .jsonl file or a text file          default: stdlib
# CORPUS_NAME     what the manifest calls the corpus                              default: made from CORPUS
# PRETRAIN_FLAGS  further flags of `prosparse pretrain`                           default: none
# SPARSIFY_FLAGS  further flags of `prosparse sparsify`                           default: none
# PYTHON          interpreter with this project's "train" extra                   default: python3
#
# The folder beside this script was made with CORPUS=stdlib.parquet (the library's sources, from another machine),
# CORPUS_NAME='Python 3.11.7 standard library' and SPARSIFY_FLAGS=--keep-held-out.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=${OUT:-runs/demo}
python=${PYTHON:-python3}
corpus=(--corpus "${CORPUS:-stdlib}" ${CORPUS_NAME:+--corpus-name "$CORPUS_NAME"})
read -ra pretrain_flags <<<"${PRETRAIN_FLAGS:-}"
read -ra sparsify_flags <<<"${SPARSIFY_FLAGS:-}"

if [[ ! -d $out-base ]]; then
    "$python" -m sparse_backend.prosparse.pretrain "$out-base" --preset demo "${corpus[@]}" "${pretrain_flags[@]}"
fi
# Without CORPUS the recipe's own, whose held-out text may be passed on with the checkpoint.
if [[ -z ${CORPUS:-} ]]; then
    corpus=()
fi
"$python" -m sparse_backend.prosparse.job "$out-base" "$out" --recipe demo "${corpus[@]}" "${sparsify_flags[@]}"
