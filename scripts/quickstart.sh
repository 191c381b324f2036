#!/usr/bin/env bash
# From nothing to a trained model: set up .venv, train a small Llama across four pipeline processes with pairwise
# interlocking on the Python standard library's sources, evaluate every exit, export to Hugging Face, generate text, and
# set beside it what backpropagation reaches on the same samples, and what it reaches in the same time.
#   bash scripts/quickstart.sh [FOLDER]      (default: runs/quickstart)
set -euo pipefail
out=$(realpath -m "${1:-runs/quickstart}")
source "$(dirname "$0")/environment.sh" requirements.txt
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
stages=4
steps=${QUICKSTART_STEPS:-1500}

say() { printf '\n== %s\n' "$*"; }

if [ "$GPUS" -lt "$stages" ]; then
  export DS_ACCELERATOR=cpu # four processes need four devices, or none
fi

training() { # OUTPUT PRESET STEPS: a command in $command; the same model, samples and rate for all
  command=(scripts/train_lm.py --deepspeed_config "ds_configs/$2.json" --model llama-nano
    --data "$out/data" --sequence-length 128 --micro-batch-size 8 --gradient-accumulation-steps 1
    --steps "$3" --eval-interval "$((steps / 3))" --output "$1")
}

rm -rf "$out"
mkdir -p "$out"

say "text: the Python standard library's sources, a byte-level BPE of 512 tokens"
"$PYTHON" scripts/prepare_data.py --out "$out/data" --vocab-size 512

say "training: four pipeline processes, one decoder layer each, pairwise interlocking, $steps batches"
training "$out" pairwise_cpu "$steps"
deepspeed --quiet --num_accelerators "$stages" --master_port "${MASTER_PORT:-29500}" "${command[@]}"

say "held-out perplexity of every exit, from the checkpoint"
"$PYTHON" scripts/evaluate_lm.py --checkpoint "$out/checkpoint" --json "$out/exits.json"

say "loss curves"
"$PYTHON" scripts/plot_losses.py --run "$out"

say "export to Hugging Face"
"$PYTHON" scripts/convert_hf.py export --checkpoint "$out/checkpoint" --out "$out/hf"

say "text sampled from the exported model"
"$PYTHON" scripts/generate.py --model "$out/hf" --prompt "import " --tokens 80

say "backpropagation, for comparison: all four stages in one process, the same numbers as in four"
backpropagation() { # STEPS
  training "$out/backpropagation-$1" global_cpu "$1"
  "$PYTHON" "${command[@]}" --one-process --stages "$stages"
}
backpropagation "$steps"
equal_time=$("$PYTHON" scripts/compare_runs.py --equal-time "$out" "$out/backpropagation-$steps")
backpropagation "$equal_time" # so many batches take pairwise interlocking's time

say "what it is good for: less waiting, so more batches in the same time"
"$PYTHON" scripts/compare_runs.py "$out" "$out/backpropagation-$equal_time" "$out/backpropagation-$steps"
cat <<TEXT
One micro-batch a batch on four stages: three of four devices wait in backpropagation, pairwise interlocking waits for
the next stage only. Batch for batch backpropagation is ahead, in equal time pairwise interlocking, although backpropagation
sends input gradients first ("backward": "split") and would take longer as 1F1B. With more stages there is more to win,
with many micro-batches less: README.md says when it pays. One seed, a small model.
TEXT

say "done: $out has the checkpoint, history.jsonl, run_report.html, losses.png, exits.json and the Hugging Face folder hf"
