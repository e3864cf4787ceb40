#!/usr/bin/env bash
# One command on a machine with a GPU: checks and times what CPUs cannot.  Needs torch, Triton, timm, tifffile, OpenCV,
# tensorboard and pytest there, DALI and DeepSpeed on PYTHONPATH; no network.
#
#   bash benchmarks/gpu_check.sh [RESULTS_FOLDER]        default: $OUT, else benchmarks/results/gpu
#   GPU_CHECK_SECONDS=570                                all stages together end within this
#
# Every stage runs by itself under a time limit; a failure does not hide the stages after it, and what comes first
# matters most.  Left in the folder: summary.txt (which passed), logs.txt (what each said), one .jsonl a benchmark
# (render with `python benchmarks/harness.py render FILE`), train.jsonl (histories of the runs), profile.txt.
# The exit status is the number of stages that failed.
set -u
cd "$(dirname "$0")/.."
results=${1:-${OUT:-benchmarks/results/gpu}}
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-570}))
export PYTHONPATH="$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
mkdir -p "$results"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$work/inductor"
summary="$results/summary.txt"
: > "$summary"
: > "$results/logs.txt"
rm -f "$results/train.jsonl" "$results/profile.txt"
failed=0

stage() { # stage NAME SECONDS COMMAND…
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status
  shift 2
  echo "=== $name" | tee -a "$results/logs.txt"
  if ((left < 10)); then
    echo "FAILED $name (no time left)" | tee -a "$summary"
    failed=$((failed + 1))
    return
  fi
  timeout -k 5 "$((limit < left ? limit : left))" "$@" > "$work/log" 2>&1
  status=$?
  cat "$work/log" >> "$results/logs.txt"
  if ((status == 0)); then
    echo "ok     $name ($((SECONDS - start)) s)" | tee -a "$summary"
  else
    echo "FAILED $name (exit $status, $((SECONDS - start)) s)" | tee -a "$summary"
    tail -n 15 "$work/log"
    failed=$((failed + 1))
  fi
}

train() { # train NAME SECONDS RECIPE OPTION…: a few steps on made chips
  local name=$1 limit=$2 recipe=$3
  shift 3
  stage "train-$name" "$limit" "$python" launch/train.py --config "$recipe" --set data.path="$work/data" \
    --set data.split.folds=4 --set train.device=gpu --set data.threads=8 --set model.pretrained=false \
    --set run.folder="$work/runs" --set run.name="$name" --set log.every=1 --set log.chips=1 "$@"
  sed "s/^{/{\"run\": \"$name\", /" "$work/runs/$name/history.jsonl" >> "$results/train.jsonl" 2> /dev/null
  cat "$work/runs/$name/profile/"*.txt >> "$results/profile.txt" 2> /dev/null
}

real=configs/biomassters.yaml
small="--set model.backbone=tf_efficientnetv2_b0 --set model.decoder_channels=[48,40,32,24,16]"

stage environment 60 "$python" benchmarks/harness.py environment
stage sample 90 "$python" launch/prepare.py sample --out "$work/data" --chips 64 --seed 1
stage pack 90 "$python" launch/prepare.py pack --data "$work/data" --out "$work/store" --workers 16
# pytest would skip all of them on a machine without a GPU, and pass
stage gpu-tests 150 bash -c '"$0" benchmarks/harness.py environment --device gpu > /dev/null &&
  exec "$0" -m pytest -q -p no:cacheprovider -m gpu tests' "$python"
stage attention 60 "$python" benchmarks/attention.py --device gpu --out "$results/attention.jsonl"
stage same-padding 30 "$python" benchmarks/same_padding.py --device gpu --out "$results/same_padding.jsonl"
stage loader 80 "$python" benchmarks/loader.py --device gpu --data "$work/data" --packed "$work/store" --n 3 \
  --modes "full augmentation" "without augmentation" --out "$results/loader.jsonl"
stage model 170 "$python" benchmarks/model.py --device gpu --n 5 --out "$results/model.jsonl"
train bf16 100 $real --set train.micro_batch=8 --set "phases=[{epochs: 3}]" --set train.compile=true --profile steps=8:10
stage predict 60 "$python" launch/predict.py --weights "$work/runs/bf16" --data "$work/data" --out "$work/out" \
  --split validation --precision bf16 --tta id,h,v,hv --batch 8 --device gpu
for zero in 1 2; do
  # shellcheck disable=SC2086 # words
  train "zero$zero-packed" 60 $real $small --set data.path="$work/store" --set train.micro_batch=8 \
    --set "phases=[{epochs: 1}]" --set train.compile=true --set train.zero_stage=$zero
done
stage deepspeed-launcher 60 "$python" -m deepspeed.launcher.runner --num_gpus 1 launch/train.py \
  --config configs/demo.yaml --set data.path="$work/data" --set "phases=[{epochs: 1}]" --set train.device=gpu \
  --set run.folder="$work/runs"

find "$results" -maxdepth 1 -type f -empty -delete
cat "$summary"
exit "$failed"
