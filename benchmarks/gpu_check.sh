#!/usr/bin/env bash
# Three calls on a machine with a GPU, each within 9 minutes: check and time what CPUs cannot.  Needs torch, Triton,
# timm, tifffile, OpenCV, tensorboard and pytest there, DALI and DeepSpeed on PYTHONPATH; no network.
#
#   bash benchmarks/gpu_check.sh 1 [RESULTS_FOLDER]      does it run, and how fast
#   bash benchmarks/gpu_check.sh 2 [RESULTS_FOLDER]      is it right
#   bash benchmarks/gpu_check.sh 3 [RESULTS_FOLDER]      what is best
#
#   GPU_CHECK_SECONDS=540   a call ends within this
#   GPU_CHECK_ONLY=REGEX    only the stages whose name matches
#   GPU_CHECK_DRY=1         every stage's command with tiny sizes on a CPU: what fails there is not the GPU's doing
#   GPU_CHECK_WORK=DIR      data, runs and compilers' caches (default: ~/.cache/biomassters/gpu-check)
#   BENCHMARK_COMMIT=HASH   the commit, where the folder is a copy without .git
#
# Results of all calls come together in one folder (default: .gpu/results): report.txt to be read first, summary.txt,
# stages/ with what each stage said, one .jsonl a benchmark (`python benchmarks/harness.py render FILE`), history/ and
# profile/ of the runs.  Where $OUT is set, report, summary, the trace and an archive of the rest are left there, too.
#
# Every stage runs by itself under a time limit; a failure does not hide the stages after it, and what comes first
# matters most.  A stage that has passed on a card is not repeated: the same call again goes on with what is missing
# (delete stages/NAME.json to have one again).  Real chips in .gpu/chips, a TIFF tree, are taken where the data path is
# checked.
# The exit status is the number of stages that did not pass.
set -u
cd "$(dirname "$0")/.." || exit 99
call=${1:-}
case $call in 1 | 2 | 3) ;; *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 99 ;; esac
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-540} - 15)) # the report and a stage's last seconds
python=${PYTHON:-python3}
dry=${GPU_CHECK_DRY:+1}
only=${GPU_CHECK_ONLY:-.}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/biomassters
results=${2:-.gpu/results}${dry:+/dry}
work=${GPU_CHECK_WORK:-$cache/gpu-check}${dry:+/dry}
mkdir -p "$results/stages" "$results/history" "$results/profile" "$work"
results=$(cd "$results" && pwd)
work=$(cd "$work" && pwd)
export PYTHONPATH="$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
if [[ $dry ]]; then
  device=cpu
  card=cpu
  # Tracing takes longer than all else here; one stage does it
  export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TORCH_COMPILE_DISABLE=1
else
  device=gpu
  card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
  card=${card:-$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))' 2> /dev/null)}
  card=${card:-none}
fi
commit=$(git rev-parse HEAD 2> /dev/null || echo "${BENCHMARK_COMMIT:-}")
export BENCHMARK_COMMIT=$commit
summary="$results/summary.txt"
echo "== call $call, $(date -u +%FT%TZ), $card" | tee -a "$summary"
failed=0

tell() { echo "$*" | tee -a "$summary"; }

stage() { # stage NAME SECONDS [--makes PATH] COMMAND…
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) made= status key marker log
  shift 2
  if [[ $1 == --makes ]]; then
    made=$2
    shift 2
  fi
  [[ $name =~ $only ]] || return
  [[ $dry ]] && limit=$((3 * limit)) # two busy cores
  marker="$results/stages/$name.json"
  log="$results/stages/$name.log"
  key=$(printf '%s\n' "$card" "$@" | sha256sum | cut -c 1-16)
  if grep -qs "\"status\": 0, .*\"key\": \"$key\"" "$marker" && [[ -z $made || -e $made ]]; then
    tell "cached $name"
    return
  fi
  if ((left < limit / 3)); then
    tell "FAILED $name (no time left: the same call again goes on here)"
    failed=$((failed + 1))
    return
  fi
  timeout -k 5 "$((limit < left ? limit : left))" "$@" > "$log" 2>&1
  status=$?
  printf '{"call": %d, "stage": "%s", "status": %d, "seconds": %d, ' "$call" "$name" "$status" "$((SECONDS - start))" \
    > "$marker"
  printf '"when": "%s", "card": "%s", "commit": "%s", "key": "%s"}\n' \
    "$(date -u +%FT%TZ)" "$card" "$commit" "$key" >> "$marker"
  if ((status == 0)); then
    tell "ok     $name ($((SECONDS - start)) s)"
  else
    tell "FAILED $name (exit $status, $((SECONDS - start)) s)"
    tail -n 15 "$log"
    failed=$((failed + 1))
  fi
}

benchmark() { # benchmark NAME SECONDS SCRIPT OPTION…: into NAME.jsonl
  local name=$1 limit=$2 script=$3
  shift 3
  stage "$name" "$limit" "$python" "benchmarks/$script.py" --device "$device" ${dry:+--smoke} \
    --out "$results/$name.jsonl" "$@"
}

tests() { # tests NAME SECONDS PYTEST-OPTION…: those marked gpu; in a dry run they are only collected
  local name=$1 limit=$2 how=(--collect-only)
  shift 2
  if [[ -z $dry ]]; then
    how=()
    "$python" -c 'import xdist' 2> /dev/null && how=(-n 6)
  fi
  # pytest would skip all of them on a machine without a GPU, and pass
  stage "$name" "$limit" bash -c '[[ $0 != none ]] && exec "$@"' "$card" \
    "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors -m gpu "${how[@]}" "$@"
}

train() { # train NAME SECONDS RECIPE STORE OPTION…: a run from its beginning
  local name=$1 limit=$2 recipe=$3 store=$4 run="$work/runs/$1"
  shift 4
  stage "$name" "$limit" --makes "$run/weights/last.safetensors" "$python" launch/train.py --config "$recipe" \
    --restart --set data.path="$store" --set train.device=$device --set model.pretrained=false \
    --set run.folder="$work/runs" --set run.name="$name" --set log.chips=0 --set validate.every=1000 "$@"
  cp "$run/history.jsonl" "$results/history/$name.jsonl" 2> /dev/null
  cp "$run/config.yaml" "$results/history/$name.yaml" 2> /dev/null
  if [[ -d $run/profile ]]; then
    mkdir -p "$results/profile/$name"
    cp "$run"/profile/steps-* "$results/profile/$name/"
  fi
}

# Sizes -------------------------------------------------------------------------------------------------------------
real=configs/biomassters.yaml
chips=44 times=4    # 176 chips: at 11 folds 160 train, ten steps of 16
folds=11 epochs=6 every=10 profile=52:55 batch=16
small=(--set model.backbone=tf_efficientnetv2_b0 --set "model.decoder_channels=[48,40,32,24,16]")
small_batch=8 precision=bf16 graphs=(--cuda-graphs)
size=(--batch 16)
if [[ $dry ]]; then
  chips=4 times=2 folds=4 epochs=2 every=1 profile=3:5 batch=2
  small=(--set model.backbone=tf_mobilenetv3_small_minimal_100 --set "model.decoder_channels=[8,8,8,8,8]")
  small+=(--set augment.month_dropout=1 --set augment.drop_month=0.9)
  small_batch=1 precision=fp32 graphs=() size=() # half precision takes a CPU minutes
fi
few=(--set data.split.folds=4 --set "phases=[{epochs: 1}]" --set log.every=1
  --set train.global_batch=$small_batch --set train.micro_batch=$small_batch)

# Stages ------------------------------------------------------------------------------------------------------------
data() { # what every call works on: a tree, a store, and a store long enough for epochs of ten steps
  stage environment 60 bash -c '"$0" benchmarks/harness.py environment --device "$1" > "$2"' \
    "$python" $device "$results/environment.json"
  stage sample 90 --makes "$work/data/sample.json" "$python" launch/prepare.py sample --out "$work/data" \
    --chips $chips --seed 1
  stage pack 90 --makes "$work/store/manifest.json" "$python" launch/prepare.py pack --data "$work/data" \
    --out "$work/store" --workers 16
  stage repeat 20 --makes "$work/long/manifest.json" "$python" benchmarks/repeat_store.py "$work/store" "$work/long" \
    --times $times
}

call1() {
  data
  tests data-tests 90 tests/data/test_pipeline.py tests/data/test_packed.py tests/data/test_pack.py
  train recipe 300 $real "$work/long" --set data.split.folds=$folds --set "phases=[{epochs: $epochs}]" \
    --set train.global_batch=$batch --set train.micro_batch=$batch --set train.precision=$precision \
    --set log.every=$every --profile steps=$profile ${dry:+"${small[@]}"}
  benchmark estimate 60 step_estimate
  # What fits: the plain model keeps two to three times as much
  stage recipe-ladder 120 bash -c '"$0" "$@" --batch 16 || "$0" "$@" --batch 8' "$python" benchmarks/model.py \
    --device $device ${dry:+--smoke} --parts training --rungs plain "compiled regions" --n 4 \
    --out "$results/recipe-ladder.jsonl"
  stage predict 90 "$python" launch/predict.py --weights "$work/runs/recipe" --data "$work/long" \
    --out "$work/runs/recipe/maps" --split all --precision $precision --tta id,h,v,hv --batch $batch --pictures 1 \
    --device $device
  # As many chips as the challenge's test set has, with four flips: is to take less than a minute, after a warm-up
  benchmark test-set 240 inference --data "$work/data" --packed "$work/store" --parts "end to end" --variants packed \
    --chips 2773 --tta id,h,v,hv --n 1
}

call2() {
  data
  tests kernels 120 tests/kernels/test_month_attention_triton.py
  stage data-check 60 "$python" benchmarks/data_check.py --device $device --chips .gpu/chips \
    ../shared/data/biomassters --most 2
  tests gpu-tests 200 tests --ignore=tests/kernels/test_month_attention_triton.py
  local zero
  for zero in 0 1 2 3; do
    train zero$zero 80 $real "$work/store" "${small[@]}" "${few[@]}" --set train.precision=$precision \
      --set train.zero_stage=$zero
  done
  train fp16 80 $real "$work/store" "${small[@]}" "${few[@]}" --set train.precision=fp16
  stage zero-agree 20 "$python" benchmarks/gpu_report.py agree "$work"/runs/zero{0,1,2,3} --steps 3
  stage fp16-agree 20 "$python" benchmarks/gpu_report.py agree "$work"/runs/{zero0,fp16} --steps 1
  local out how=()
  for out in eager graphs; do
    stage predict-$out 60 "$python" launch/predict.py --weights "$work/runs/zero0" --data "$work/store" \
      --out "$work/runs/zero0/maps-$out" --split all --precision $precision --batch 4 --pictures 0 --device $device "${how[@]}"
    how=("${graphs[@]}")
  done
  stage graphs-agree 20 "$python" benchmarks/gpu_report.py same "$work"/runs/zero0/maps-{eager,graphs}
  stage launcher 90 "$python" -m deepspeed.launcher.runner --num_gpus 1 launch/train.py --config configs/demo.yaml \
    --restart --set data.path="$work/data" --set data.split.folds=4 --set "phases=[{epochs: 1}]" \
    --set train.device=$device --set run.name=launcher --set run.folder="$work/runs"
}

call3() {
  data
  benchmark lever-dali 60 levers --levers dali --packed "$work/store" "${size[@]}"
  benchmark lever-cudnn 200 levers --levers cudnn "${size[@]}"
  benchmark levers-cheap 150 levers --together --levers stem upsample months "${size[@]}"
  TORCH_COMPILE_DISABLE=0 benchmark lever-static 150 levers --levers static "${size[@]}"
  benchmark lever-graph 120 levers --levers graph "${size[@]}"
  benchmark lever-products 200 levers --levers products "${size[@]}"
  benchmark stages 100 model --parts stages --n 3
  benchmark attention 60 attention
  benchmark inference 150 inference --data "$work/data" --packed "$work/store" --chips 128 --tta id,h,v,hv --n 2
  benchmark loader 80 loader --data "$work/data" --packed "$work/store" --n 2 --modes "full augmentation"
  benchmark ladder 150 model --parts training inference --n 3
  benchmark same-padding 40 same_padding
}

"call$call"
timeout 30 "$python" benchmarks/gpu_report.py report "$results" > "$results/report.txt" 2>&1
cat "$results/report.txt"
if [[ ${OUT:-} && -d $OUT ]]; then
  cp "$results/report.txt" "$summary" "$OUT/"
  cp "$results"/profile/recipe/*.json.gz "$OUT/" 2> /dev/null
  tar -C "$results" --exclude='*.json.gz' -czf "$OUT/results.tar.gz" .
fi
echo "$failed stages did not pass"
exit "$failed"
