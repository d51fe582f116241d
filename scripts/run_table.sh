#!/usr/bin/env bash
# The per-disease table of one family, or of all: base, base + same retraining, + MGLL.
#
#   ENCODER=mgll-fundus.pt LABELS=labels.csv IMAGES=images/ scripts/run_table.sh llava-med
#   ENCODER=mgll-fundus.pt LABELS=labels.csv IMAGES=images/ scripts/run_table.sh all
#
# Stopped or killed, the same command goes on where it stopped: a stage whose output exists is not run again, and
# training and scoring continue inside their stage.
#
#   MLLM      checkpoint folder or hub id; with "all", a folder that has one named for each family
#             (default: the published checkpoint of each)
#   OUT       folder of everything          (default: tables)
#   PRESET    diseases asked about          (default: fundus10)
#   BUILD     further options of eval-mcq build, such as "--patient-column patient"
#   ALIGN     images to align connectors on; empty for none   (default: those of the training questions)
#   RECIPE    of the retraining             (default: scripts/recipes/FAMILY/projector.yaml)
#   TRAIN     further options or key=value of retrain-projector
#   LAUNCH    put before retrain-projector, such as "torchrun --nproc-per-node 8 --no-python"
#             (default: one process, without the recipe's DeepSpeed)
#   RUN       further options of eval-mcq run, such as "--rotations 4"
set -euo pipefail

scripts=$(cd "$(dirname "$0")" && pwd)
families="llava llava-med qwen-vl internvl mini-gemini instructblip med-flamingo janus-pro"

usage() {
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  exit 2
}

stage() { # stage OUTPUT COMMAND...: run the command unless its output exists
  local output=$1
  shift
  if [[ -e $output ]]; then
    echo "$output exists" >&2
  else
    echo "+ $*" >&2
    "$@"
  fi
}

[[ $# -eq 1 && -n ${ENCODER:-} && -n ${LABELS:-} && -n ${IMAGES:-} ]] || usage
out=${OUT:-tables}
preset=${PRESET:-fundus10}

if [[ $1 == all ]]; then # a family that fails does not keep the others from their table
  trap 'exit 130' INT
  arms=() failed=
  for family in $families; do
    if MLLM=${MLLM:+$MLLM/$family} "$0" "$family"; then
      for arm in base control mgll; do arms+=("$family:$arm=$out/$family/runs/$arm"); done
    else
      failed+=" $family"
    fi
  done
  if [[ ${#arms[@]} -gt 0 ]]; then
    eval-mcq compare "${arms[@]}" --format markdown --table-layout paper --out "$out/table.md" --force
    eval-mcq compare "${arms[@]}" --table-layout paper
  fi
  [[ -z $failed ]] || { echo "error: no table of$failed: see above; the same command goes on with them" >&2; exit 1; }
  exit
fi

family=$1
here=$out/$family
recipe=${RECIPE:-$scripts/recipes/$family/projector.yaml}
align=${ALIGN-$out/train.jsonl}
[[ -e $recipe ]] || { echo "error: $recipe does not exist: family is one of $families, or set RECIPE" >&2; exit 2; }
mkdir -p "$here/runs"

# shellcheck disable=SC2086  # BUILD, TRAIN, LAUNCH and RUN are lists of words
{
  for split in train test; do
    stage "$out/$split.jsonl" eval-mcq build --labels "$LABELS" --images "$IMAGES" --preset "$preset" ${BUILD:-} \
      --split $split --out "$out/$split.jsonl"
  done
  stage "$out/train.json" eval-mcq export "$out/train.jsonl" --images "$IMAGES" --out "$out/train.json"
  stage "$here/base" swap-encoder convert --mllm "${MLLM:-$family}" --out "$here/base"
  stage "$here/mgll" swap-encoder --mllm "$here/base" --encoder "$ENCODER" ${align:+--align "$align"} --out "$here/mgll"
  retrained=$here/mgll-retrained resume= single=
  if [[ -e $retrained ]] || compgen -G "$retrained.training/checkpoint-*" >/dev/null; then resume=--resume; fi
  [[ -n ${LAUNCH:-} ]] || single=deepspeed=null
  stage "$retrained-control" ${LAUNCH:-} retrain-projector --model "$here/mgll" --control "$here/base" \
    --data "$out/train.json" --images "$IMAGES" --recipe "$recipe" $single ${TRAIN:-} $resume --out "$retrained"
  for run in base=base control=mgll-retrained-control mgll=mgll-retrained; do
    stage "$here/runs/${run%%=*}/summary.json" eval-mcq run --model "$here/${run#*=}" --bench "$out/test.jsonl" ${RUN:-} \
      --out "$here/runs/${run%%=*}"
  done
}
arms=("base=$here/runs/base" "control=$here/runs/control" "mgll=$here/runs/mgll")
eval-mcq compare "${arms[@]}" --format markdown --out "$here/table.md" --force
stage "$here/report.html" eval-mcq report "${arms[@]}" --out "$here/report.html"
eval-mcq compare "${arms[@]}"
