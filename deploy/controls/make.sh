#!/usr/bin/env bash
# The control runs: a 91 M base trained from scratch, then every control and variant of the recipe from it, with equal tokens.
# About ten minutes on four data-centre GPUs; every GPU in sight is used, one run on each. Interrupted, it goes on.
#
#   TEXTS=runs/texts OUT=runs/controls deploy/controls/make.sh
#
# TEXTS         folder of Parquet files, one a domain (see corpus.py)                default: runs/texts
# OUT           folder to create; the base goes to OUT-base, the recipes to OUT-recipes   default: runs/controls
# BASE_TOKENS   of the base                                                         default: 48000000
# TOKENS        of each run                                                         default: 35000000
# PRESET        of `prosparse pretrain`                                             default: 91m
# TOKENIZER     folder of a tokenizer, in place of one trained on the texts         default: none
# FLAGS         further flags of both commands, such as --compile                   default: none
# PART          base, runs or all                                                   default: all
# PYTHON        interpreter with this project's "train" extra                       default: python3
set -euo pipefail
cd "$(dirname "$0")/../.."

texts=$(realpath "${TEXTS:-runs/texts}")
out=${OUT:-runs/controls}
python=${PYTHON:-python3}
recipes=$out-recipes
read -ra flags <<<"${FLAGS:-}"

# The paper's stages (7B) over 33 M tokens or whatever --tokens makes of them, with λ that fit this model.
stage_0='{name: ReLU, peak: 0, tokens: 10_000_000}'
rise='{name: warm-up, peak: 1.5e-6, tokens: 2_000_000}, {name: rise, peak: 1.5e-5, tokens: 8_000_000},
  {name: stability, peak: 1.5e-5, tokens: 4_000_000}, {name: rise, peak: 6e-5, tokens: 8_000_000}'
last='{name: stability, peak: 6e-5, tokens: 1_000_000}'

# recipe NAME SETTINGS STAGES: one recipe on the common text.
recipe() {
    {
        echo "data:"
        echo "  held_out: 0.0125"
        echo "  sources:"
        for file in "$texts"/*.parquet; do
            echo "    - {path: $file, name: $(basename "$file" .parquet)}"
        done
        echo "training: {context: ${CONTEXT:-512}, batch: ${BATCH:-64}, learning_rate: 8e-4${2:+, $2}}"
        echo "stages: [$3]"
        echo "threshold: {sweep: [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4]}"
    } >"$recipes/$1.yaml"
}

fixed() { echo "{name: fixed L1, peak: $1, tokens: 33_000_000}"; }

mkdir -p "$recipes"
recipe paper "" "$stage_0, $rise, $last"
# In the order in which they are run.
variants=(fixed-2e-5 fixed-6e-5 fixed-3e-5 without-stage-0 within-half fixed-2e-5-seed-1 wsd fixed-wsd fixed-1.4e-5)
for peak in 1.4e-5 2e-5 3e-5 6e-5; do
    recipe "fixed-$peak" "" "$(fixed $peak)"
done
recipe fixed-2e-5-seed-1 "seed: 1" "$(fixed 2e-5)"
recipe without-stage-0 "" "$rise, $last"
# All stages in the first half, the peak held in the second.
recipe within-half "" "$stage_0, $rise, $last, {name: hold, peak: 6e-5, tokens: 33_000_000}"
# The learning rate stays up until λ has been at its peak for a while, and falls in the last fifth.
decay='{name: decay, peak: 6e-5, tokens: 8_250_000}'
recipe wsd "learning_rate_schedule: wsd" "$stage_0, $rise, $last, $decay"
recipe fixed-wsd "learning_rate_schedule: wsd" "$(fixed 6e-5), $decay"

also=()
for name in "${variants[@]}"; do
    also+=("$recipes/$name.yaml")
done

part=${PART:-all}
if [[ $part != runs && ! -d $out-base ]]; then
    "$python" -m sparse_backend.prosparse.pretrain "$out-base" --preset "${PRESET:-91m}" --tokens "${BASE_TOKENS:-48000000}" \
        --corpus "$texts" ${TOKENIZER:+--tokenizer "$TOKENIZER"} "${flags[@]}"
fi
if [[ $part != base ]]; then
    "$python" -m sparse_backend.prosparse.controls "$out-base" "$out" --recipe "$recipes/paper.yaml" \
        --tokens "${TOKENS:-35000000}" --also "${also[@]}" "${flags[@]}"
fi
