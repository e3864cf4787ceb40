#!/usr/bin/env bash
# One command on a machine with a GPU: checks and times what CPUs cannot.  Needs torch, Triton, timm, tifffile,
# tensorboard and pytest there, DALI and DeepSpeed on PYTHONPATH; no network.
#
#   bash benchmarks/gpu_check.sh [RESULTS_FOLDER]        default: $OUT, else benchmarks/results/gpu
#
# Every stage runs by itself under a time limit and leaves NAME.log; a failure does not hide the stages after it.
# summary.txt tells which passed.  The exit status is the number of stages that failed.
set -u
cd "$(dirname "$0")/.."
results=${1:-${OUT:-benchmarks/results/gpu}}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
mkdir -p "$results"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary="$results/summary.txt"
: > "$summary"
failed=0

stage() { # stage NAME SECONDS COMMAND…
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "=== $name"
  if timeout -k 10 "$limit" "$@" > "$results/$name.log" 2>&1; then
    echo "ok     $name ($((SECONDS - start)) s)" | tee -a "$summary"
  else
    echo "FAILED $name (exit $?, $((SECONDS - start)) s)" | tee -a "$summary"
    tail -n 15 "$results/$name.log"
    failed=$((failed + 1))
  fi
}

recipe() { # recipe NAME SECONDS OPTION…: a few steps of the real model on made chips
  local name=$1 limit=$2
  shift 2
  stage "train-$name" "$limit" "$python" launch/train.py --config configs/biomassters.yaml --set data.path="$work/data" --set data.split.folds=4 \
    --set data.threads=8 --set model.pretrained=false --set run.folder="$work/runs" --set run.name="$name" \
    --set log.every=1 --set log.chips=1 --set train.micro_batch=8 "$@"
  cp "$work/runs/$name/history.jsonl" "$results/train-$name.jsonl" 2> /dev/null
  cat "$work/runs/$name/profile/"*.txt > "$results/train-$name-profile.txt" 2> /dev/null
}

stage environment 60 "$python" - <<'PY'
import importlib.metadata as m, platform, subprocess, torch
print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
print(torch.cuda.get_device_properties(0))
for name in ("triton", "nvidia-dali-cuda130", "deepspeed", "timm", "numpy"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "has no metadata here")
import nvidia.dali, deepspeed  # noqa: F401
PY
stage sample 120 "$python" launch/prepare.py sample --out "$work/data" --chips 64 --seed 1
stage gpu-tests 240 "$python" -m pytest -q -p no:cacheprovider -m gpu tests
recipe bf16 150 --set "phases=[{epochs: 3}]" --profile steps=8:10
recipe zero2 120 --set "phases=[{epochs: 1}]" --set train.zero_stage=2
stage predict 90 "$python" launch/predict.py --weights "$work/runs/bf16" --data "$work/data" --out "$work/out" \
  --split validation --precision bf16 --tta id,h,v,hv --batch 8
stage deepspeed-launcher 120 "$python" -m deepspeed.launcher.runner --num_gpus 1 launch/train.py \
  --config configs/demo.yaml --set data.path="$work/data" --set "phases=[{epochs: 1}]" --set run.folder="$work/runs"

cat "$summary"
exit "$failed"
