#!/usr/bin/env bash
# From nothing to a trained model: set up .venv, train a small Llama across four pipeline processes with pairwise
# interlocking on the Python standard library's sources, evaluate every exit, export to Hugging Face, generate text.
#   bash scripts/quickstart.sh [FOLDER]      (default: runs/quickstart)
set -euo pipefail
out=$(realpath -m "${1:-runs/quickstart}")
source "$(dirname "$0")/environment.sh" requirements.txt
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
stages=4
steps=${QUICKSTART_STEPS:-200}

say() { printf '\n== %s\n' "$*"; }

if [ "$GPUS" -lt "$stages" ]; then
  export DS_ACCELERATOR=cpu # four processes need four devices, or none
fi

rm -rf "$out"
mkdir -p "$out"

say "text: the Python standard library's sources, a byte-level BPE of 2048 tokens"
"$PYTHON" scripts/prepare_data.py --out "$out/data" --vocab-size 2048 --max-bytes 6000000

say "training: four pipeline processes, pairwise interlocking, $steps batches"
deepspeed --num_accelerators "$stages" --master_port "${MASTER_PORT:-29500}" scripts/train_lm.py \
  --deepspeed_config ds_configs/pairwise_cpu.json --model models/configs/llama-tiny.json --partition 2,2,2,2 --data "$out/data" \
  --sequence-length 128 --steps "$steps" --eval-interval 100 --output "$out"

say "held-out perplexity of every exit"
"$PYTHON" scripts/evaluate_lm.py --checkpoint "$out/checkpoint" --json "$out/exits.json"

say "loss curves"
"$PYTHON" scripts/plot_losses.py --run "$out"

say "export to Hugging Face"
"$PYTHON" scripts/convert_hf.py export --checkpoint "$out/checkpoint" --out "$out/hf"

say "text sampled from the exported model"
"$PYTHON" scripts/generate.py --model "$out/hf" --prompt "import " --tokens 80

say "done: $out has the checkpoint, history.jsonl, losses.png, exits.json and the Hugging Face folder hf"
