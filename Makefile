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
# pip shows its bars at a terminal only
PIP := $(PY) -m pip install $(shell test -t 2 || echo -q) $(if $(strip $(CONSTRAINTS)),-c $(CONSTRAINTS))

# One BLAS thread per process and one process per core is the fastest split for the tests.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 8))')
# papermill with a line at the terminal that says what it is doing and how long that will take
PAPER := $(PY) -m adcam.cli paper

.PHONY: help install figure4 table3 fig1 fig2_3 fig5 fig6 theorem41 table1 related table2 coco photos voc voc-public claims results outcome redraw checkpoints bench bench-gpu course slides test export check readme docs dist clean

help: ## list the targets; times are those of two CPU cores
	@awk -F ':.*## ' '/^[a-z][a-z0-9_-]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

# $(call paper,NAME): run one notebook at full size; its parameters and its output are named on the line.
define paper
	$(PAPER) $(1) -f configs/$(1).yaml --out $(OUT)$(if $(strip $(WITH)), $(WITH))
endef

figure4: install ## Figure 4: mIoU, FP and FN against k and T, from the shipped checkpoints (4 min)
	$(call paper,fig4)

table3: install ## Table 3: CAM, TS-CAM, Att-Diffu, AD-CAM with and without stop-gradient (11 min)
	$(call paper,table3)

fig5: install ## Figure 5: heat maps of the methods with their FP and FN (half a minute)
	$(call paper,fig5)

fig6: install ## Figure 6: the diffusion step by step (half a minute)
	$(call paper,fig6)

theorem41: install ## Theorem 4.1 checked on random neighborhoods (half a minute)
	$(call paper,theorem41)

fig1: install ## Figure 1: heat maps of a CNN, a ViT, TS-CAM and AD-CAM with their FP and FN (9 min)
	$(call paper,fig1)

# Figure 3 on photographs: make fig2_3 OUT=results/voc WITH="-p data=FOLDER -p vit_weights=FILE"
fig2_3: install ## Figures 2 and 3: the pipeline with its shapes, the refinement of an attention matrix (half a minute)
	$(call paper,fig2_3)

table1: install ## Table 1: ten methods from seeds to segmentation networks (1.5 h)
	$(call paper,table1)

related: install ## the related work in Table 1: Score-CAM, PCM, SEAM, OAA+, PSA (1 h)
	$(PAPER) table1 -f configs/table1_related.yaml --out $(OUT)/related

table2: install ## Table 2: what training and extraction of each method cost (1 min)
	$(call paper,table2)

# WITH="-p weights=FILE -p resnet=FILE -p init=FILE" names the start weights
coco: OUT = results/coco
coco: install ## the whole table on MS COCO 2014: make coco DATA=FOLDER (days, on GPUs)
	@test -n "$(DATA)" || { echo "COCO is not shipped: make coco DATA=FOLDER (adcam data get coco2014 FOLDER)" >&2; exit 1; }
	$(PAPER) coco -f configs/coco.yaml -p data=coco2014:$(DATA) $(WITH) --out $(OUT)

# WITH="-p pretrained=False -p cnn_weights=FILE -p vit_weights=FILE" takes weights from files where there is no network
photos: OUT = results/photos
photos: install ## AD-CAM from public networks on photographs with masks: make photos DATA=FOLDER (40 min for 200)
	@test -n "$(DATA)" || { echo "photographs are not shipped: make photos DATA=FOLDER, a folder in PASCAL VOC layout" >&2; exit 1; }
	$(PAPER) photos -f configs/photos.yaml -p data=$(DATA) $(WITH) --out $(OUT)

# COUNTS=FOLDER reads what tools/voc_measure.py has counted, perhaps on a GPU, and makes table3 (with why), fig4, fig5, fig6, table1 (with baselines) of it
# LIMIT=4 tries the way; ONLY=fig4,table3 takes some; WITH="--lists train,val --network CNN+VIT" and more: tools/voc_public.py --help
voc-public: install ## every file of results/voc but kit: make voc-public DATA=FOLDER CNN=FILE VIT=FILE (a day, goes on where it was stopped; 2 min from COUNTS=FOLDER)
	$(PY) tools/voc_public.py $(if $(DATA),--data "$(DATA)") $(if $(COUNTS),--counts "$(COUNTS)") $(if $(CNN),--cnn-weights "$(CNN)") $(if $(VIT),--vit-weights "$(VIT)") \
	  $(if $(LIMIT),--limit $(LIMIT)) $(if $(ONLY),--only $(ONLY)) $(if $(filter command line,$(origin OUT)),--out "$(OUT)") $(WITH)

# Conformer-S as published, VOC with SBD, GPUs: make voc DATA=FOLDER WEIGHTS=FILE WITH="--resnet timm --init timm --processes 8"
# LIMIT=2 tries the way with the shortest trainings; ESTIMATE=1 only says the hours
voc: OUT = results/voc_paper
voc: install ## Tables 1 and 3 of the paper as printed: make voc DATA=FOLDER WEIGHTS=FILE (hours, on a GPU; says how many first)
	@test -n "$(DATA)$(ESTIMATE)" || { echo "VOC is not shipped: make voc DATA=FOLDER WEIGHTS=FILE (adcam data get voc2012 FOLDER), or ESTIMATE=1" >&2; exit 1; }
	$(PY) -m adcam.reproduce --data "$(DATA)" --weights "$(WEIGHTS)" --out $(OUT) $(if $(LIMIT),--limit $(LIMIT)) $(if $(ESTIMATE),--estimate) $(WITH)

claims: OUT = results/claims
claims: install ## every claim of the paper with its verdict, read from results/ (seconds)
	$(call paper,claims)

results: figure4 table3 fig1 fig2_3 fig5 fig6 theorem41 table1 related table2 outcome ## every table and figure on Scenes, shown in the notebooks that make them (3 h)

outcome: install ## put what results/ holds into the figure notebooks (seconds)
	$(PY) tools/outcome.py

redraw: install ## the figures of results/mini once more from their numbers, after a change of style
	$(PY) tools/redraw.py

checkpoints: install ## train the three seeds anew, with and without stop-gradient (hours)
	$(PY) -m adcam.cli checkpoints

BENCHES := $(filter-out tools/bench/gpu.py,$(wildcard tools/bench/*.py))
bench: install ## measure speed ratios: results/mini/bench.json, and results/bench for each tools/bench/*.py (50 min)
	$(PY) -m adcam.cli bench --out $(OUT)
	n=0; for script in $(BENCHES); do n=$$((n + 1)); echo "$$n of $(words $(BENCHES)): $$script" >&2; OMP_NUM_THREADS=1 $(PY) $$script || exit 1; done

bench-gpu: install ## speed and correctness on one GPU: results/bench/gpu.json (195 s at most; ROWS=a,b takes only rows named so)
	$(PY) tools/bench/gpu.py $(if $(ROWS),--rows "$(ROWS)")

course: install ## write the students' versions of the course's lessons
	$(PY) tools/course.py build

# npm pack reveal.js@4 mathjax@3, extract both; REVEAL and MATHJAX are the two folders `package`
slides: install ## slides of the course, for use offline: make slides REVEAL=FOLDER MATHJAX=FOLDER
	@test -n "$(REVEAL)" -a -n "$(MATHJAX)" || { echo "slides need two npm packages on this machine: npm pack reveal.js@4 mathjax@3, extract both, then make slides REVEAL=FOLDER MATHJAX=FOLDER" >&2; exit 1; }
	$(PY) tools/course.py slides _slides --reveal $(REVEAL) --mathjax $(MATHJAX)

test: install ## module notebooks, then pytest, which also runs every figure notebook at smoke size (15 min)
	OMP_NUM_THREADS=1 $(BIN)nbdev_test --path nbs --skip_folder_re '^[_.]|^paper$$|^course$$' --n_workers $(WORKERS) --timing --do_print
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests

export: install ## after an edit of nbs/*.ipynb: write adcam/*.py and the contents of the notebooks anew (running one does not)
	$(BIN)nbdev_export
	$(PY) tools/contents.py

check: install ## the exported modules, the notebooks and README.md agree (seconds)
	$(PY) tools/check.py

readme: install ## run nbs/index.ipynb on what was measured, write README.md from it (half a minute)
	$(PY) -m nbconvert --log-level ERROR --to notebook --execute --inplace nbs/index.ipynb 2> >(grep -v 'over TCP without encryption' >&2)
	$(BIN)nbdev_clean --fname nbs/index.ipynb
	$(PY) tools/readme.py

# Sphinx is not part of `make install`; it reads the notebooks as they are committed and runs none
docs: install ## the whole book as a site that needs no server: _docs/index.html (a minute)
	$(PIP) $(shell $(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	$(PY) docs/build.py _docs

dist: install ## a wheel for a package index, in dist: notebooks and configs inside, links of the description absolute (seconds)
	$(PY) tools/dist.py

clean: ## remove caches and executed notebooks, keep what was measured
	rm -rf .cache _proc _docs _slides build dist .pytest_cache .hypothesis results/try
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs -r rm -rf
	find results -name '*.ipynb' -delete
