# Sourced by the tiny recipes: `launch script.py ...` on one GPU or, without one, on two CPU processes of one thread
# each. A recipe divides its global batch by $processes: the result does not depend on how it is split.
processes=1 config=accelerate_configs/single_gpu.yaml
if [ "$(python -c 'import torch; print(torch.cuda.is_available())')" = False ]; then
    config=accelerate_configs/cpu.yaml
    [ "$(env -u OMP_NUM_THREADS nproc)" -lt 2 ] || processes=2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
launch() {
    accelerate launch --config_file "$config" --num_processes "$processes" --mixed_precision no "$@"
}
