# Everything a reader needs, as `make TARGET`. `make` alone lists the targets.
#
#   VENV=PATH         the virtual environment, .venv by default; `VENV=` (empty) uses the python on PATH, as in conda
#   CONSTRAINTS=      (empty) lets pip choose the newest versions instead of the tested ones
#   TORCH_INDEX=URL   take torch and torchvision from another wheel index first, such as PyTorch's own CPU wheels
#   OUT=DIR           where tables and figures are written, results/mini by default

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV        ?= .venv
PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
OUT         ?= results/mini

ifeq ($(strip $(VENV)),)
BIN   :=
READY :=
else
BIN   := $(VENV)/bin/
READY := $(VENV)/.ok
endif
PY  := $(BIN)python
PIP := $(PY) -m pip install -q $(if $(strip $(CONSTRAINTS)),-c $(CONSTRAINTS))

# One BLAS thread per process and one process per core is the fastest split for the tests.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 8))')
# ipykernel says this at every start of a kernel; it listens on this machine only
QUIET     := 2> >(grep -v 'over TCP without encryption' >&2)
PAPERMILL := $(BIN)papermill -k python3 --no-progress-bar --start-timeout 180 --execution-timeout 3600

.PHONY: help install figure4 table3 fig1 fig5 fig6 theorem41 table1 table2 coco photos voc voc-public claims results checkpoints bench bench-gpu course slides test check readme clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

ifneq ($(READY),)
$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
ifneq ($(strip $(TORCH_INDEX)),)
	$(PIP) torch torchvision --index-url $(TORCH_INDEX)
endif
	$(PIP) -e ".[dev]"
	touch $@
endif

install: $(READY) ## create .venv and install adcam with its tools (minutes the first time, then nothing)
	@$(PY) -c "import adcam" || { echo 'adcam is not importable by "$(PY)": run pip install -e ".[dev]" there' >&2; exit 1; }

# $(call paper,NAME): run one notebook at full size; its kernel, its parameters and its output are named on the line.
define paper
	@mkdir -p $(OUT)
	$(PAPERMILL) nbs/paper/$(1).ipynb $(OUT)/$(1).ipynb -f configs/$(1).yaml -p out_dir $(OUT) $(QUIET)
	@$(PY) tools/show.py $(OUT) $(1)
endef

figure4: install ## Figure 4: mIoU, FP and FN against k and T, from the shipped checkpoints
	$(call paper,fig4)

table3: install ## Table 3: CAM, TS-CAM, Att-Diffu, AD-CAM with and without stop-gradient
	$(call paper,table3)

fig5: install ## Figure 5: heat maps of the methods with their FP and FN
	$(call paper,fig5)

fig6: install ## Figure 6: the diffusion step by step
	$(call paper,fig6)

theorem41: install ## Theorem 4.1 checked on random neighborhoods
	$(call paper,theorem41)

fig1: install ## Figure 1: heat maps of a CNN, a ViT, TS-CAM and AD-CAM with their FP and FN
	$(call paper,fig1)

table1: install ## Table 1: ten methods from seeds to segmentation networks (an hour to an hour and a half on two cores)
	$(call paper,table1)

table2: install ## Table 2: what training and extraction of each method cost
	$(call paper,table2)

# WITH="-p weights FILE -p resnet FILE -p init FILE" names the start weights
coco: OUT = results/coco
coco: install ## the whole table on MS COCO 2014: make coco DATA=FOLDER (days, on GPUs)
	@test -n "$(DATA)" || { echo "COCO is not shipped: make coco DATA=FOLDER (adcam data get coco2014 FOLDER)" >&2; exit 1; }
	@mkdir -p $(OUT)
	$(PAPERMILL) nbs/paper/coco.ipynb $(OUT)/coco.ipynb -f configs/coco.yaml -p data coco2014:$(DATA) $(WITH) -p out_dir $(OUT) $(QUIET)
	@$(PY) tools/show.py $(OUT) coco

# WITH="-p pretrained False -p cnn_weights FILE -p vit_weights FILE" takes weights from files where there is no network
photos: OUT = results/photos
photos: install ## AD-CAM from public networks on photographs with masks: make photos DATA=FOLDER
	@test -n "$(DATA)" || { echo "photographs are not shipped: make photos DATA=FOLDER, a folder in PASCAL VOC layout" >&2; exit 1; }
	@mkdir -p $(OUT)
	$(PAPERMILL) nbs/paper/photos.ipynb $(OUT)/photos.ipynb -f configs/photos.yaml -p data $(DATA) $(WITH) -p out_dir $(OUT) $(QUIET)
	@$(PY) tools/show.py $(OUT) photos

# COUNTS=FOLDER reads what tools/voc_measure.py has counted, perhaps on a GPU; DATA=FOLDER CNN=FILE VIT=FILE count here first
voc-public: OUT = results/voc
voc-public: COUNTS ?= .cache/voc/counts
voc-public: install ## Table 3 and Figures 4 to 6 on PASCAL VOC with public networks: make voc-public DATA=FOLDER CNN=FILE VIT=FILE
	@test -n "$(DATA)$(wildcard $(COUNTS)/*.npz)" || { echo "nothing to read: give COUNTS=FOLDER, or DATA=FOLDER CNN=FILE VIT=FILE (tools/weights/convert.py makes the files)" >&2; exit 1; }
	test -z "$(DATA)" || $(PY) tools/voc_measure.py --data $(DATA) --cnn-weights $(CNN) --vit-weights $(VIT) --work .cache/voc --out $(COUNTS) all
	@mkdir -p $(OUT)
	for name in table3 fig4 fig5 fig6; do $(PAPERMILL) nbs/paper/$$name.ipynb $(OUT)/$$name.ipynb -p counts $(abspath $(COUNTS)) -p out_dir $(OUT) $(QUIET) || exit 1; $(PY) tools/show.py $(OUT) $$name; done

# Conformer-S as published, VOC with SBD, GPUs: make voc DATA=FOLDER WEIGHTS=FILE WITH="--resnet timm --init timm --processes 8"
# LIMIT=2 tries the way; ESTIMATE=1 only says the hours
voc: OUT = results/voc_paper
voc: install ## Tables 1 and 3 of the paper as printed: make voc DATA=FOLDER WEIGHTS=FILE (hours, on a GPU; says how many first)
	@test -n "$(DATA)$(ESTIMATE)" || { echo "VOC is not shipped: make voc DATA=FOLDER WEIGHTS=FILE (adcam data get voc2012 FOLDER), or ESTIMATE=1" >&2; exit 1; }
	$(PY) -m adcam.reproduce --data "$(DATA)" --weights "$(WEIGHTS)" --out $(OUT) $(if $(LIMIT),--limit $(LIMIT)) $(if $(ESTIMATE),--estimate) $(WITH)

claims: OUT = results/claims
claims: install ## every claim of the paper with its verdict, read from results/
	$(call paper,claims)

results: figure4 table3 fig1 fig5 fig6 theorem41 table1 table2 ## every table and figure on Scenes

checkpoints: install ## train the three seeds anew, with and without stop-gradient (hours on a CPU)
	$(PY) -m adcam.cli checkpoints

bench: install ## measure speed ratios: results/mini/bench.json, and results/bench for each tools/bench/*.py
	$(PY) -m adcam.cli bench --out $(OUT)
	for script in $(filter-out tools/bench/gpu.py,$(wildcard tools/bench/*.py)); do OMP_NUM_THREADS=1 $(PY) $$script || exit 1; done

bench-gpu: install ## speed and correctness on one GPU: results/bench/gpu.json (three minutes; ROWS=a,b takes only rows named so)
	$(PY) tools/bench/gpu.py $(if $(ROWS),--rows "$(ROWS)")

course: install ## write the students' versions of the course's lessons
	$(PY) tools/course.py build

# npm pack reveal.js@4 mathjax@3, extract both; REVEAL and MATHJAX are the two folders `package`
slides: install ## slides of the course, for use offline: make slides REVEAL=FOLDER MATHJAX=FOLDER
	@test -n "$(REVEAL)" -a -n "$(MATHJAX)" || { echo "slides need two npm packages on this machine: npm pack reveal.js@4 mathjax@3, extract both, then make slides REVEAL=FOLDER MATHJAX=FOLDER" >&2; exit 1; }
	$(PY) tools/course.py slides _slides --reveal $(REVEAL) --mathjax $(MATHJAX)

test: install ## module notebooks, then pytest, which also runs every figure notebook at smoke size
	OMP_NUM_THREADS=1 $(BIN)nbdev_test --path nbs --skip_folder_re '^[_.]|^paper$$|^course$$' --n_workers $(WORKERS) --timing
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests

check: install ## the exported modules, the notebooks and README.md agree
	$(PY) tools/check.py

readme: install ## run nbs/index.ipynb on what was measured, write README.md from it
	$(PY) -m nbconvert --log-level ERROR --to notebook --execute --inplace nbs/index.ipynb $(QUIET)
	$(BIN)nbdev_clean --fname nbs/index.ipynb
	$(PY) tools/readme.py

clean: ## remove caches and executed notebooks, keep what was measured
	rm -rf .cache _proc _docs _slides build dist .pytest_cache .hypothesis results/try
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs -r rm -rf
	find results -name '*.ipynb' -delete
