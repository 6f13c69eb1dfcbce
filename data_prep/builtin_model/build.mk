# How the built-in model is made: `make builtin DATA=DIR [BUILD=DIR]`. Ctrl-C stops it after the present step,
# and the same command goes on from there.
#
# Two models are made in the same way, but the second (`plain`) with another teacher. The mean of both is averaged
# with the third built-in model. All that went before is in the repository's history.

BUILD ?= build/builtin
# The commits that have the second built-in model, which is gone on from, and the third.
COMMIT_second := a9ac247
COMMIT_third := 98bc191
RECIPE = $(BIN)/python -m data_prep.builtin_model
TUNE = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m data_prep.builtin_model.tune

# What the two differ in.
START_plain = --plain
TUNE_plain = adjust=false
TUNE_careful = seed=2

.SECONDARY:
.NOTPARALLEL:

$(BUILD)/measured: $(BUILD)/careful/made $(BUILD)/plain/made $(BUILD)/third/taken
	$(RECIPE).recipe pack $(BUILD)/careful/model --mix $(BUILD)/plain/model --out $(BUILD)/mean
	$(RECIPE).recipe pack $(BUILD)/mean --mix $(BUILD)/third --side 256 --out $(BUILD)/model
	$(RECIPE).strength --data $(DATA) --model $(BUILD)/model --cache $(BUILD)/vectors
	$(RECIPE).measure --data $(DATA) --model $(BUILD)/model --write
	touch $@

$(BUILD)/%/taken:
	mkdir -p $(BUILD)/$*
	git archive $(COMMIT_$*) clipkit/builtin | tar x -C $(BUILD)/$* --strip-components 2
	touch $@

$(BUILD)/%/started: $(BUILD)/second/taken
	$(RECIPE).recipe start --data $(DATA) --gallery data_prep/gallery/pictures --first $(BUILD)/second \
		--wordnet "$(WORDNET)" $(START_$*) --out $(BUILD)/$*/start
	$(BIN)/clipkit data build $(DATA)/flickr8k/train.jsonl $(BUILD)/$*/start/more.jsonl --out $(BUILD)/$*/dataset \
		--validation 0 --test 0 --max-repeats 0 --overwrite
	touch $@

# A run that was stopped has a checkpoint to go on from.
$(BUILD)/%/tuned: $(BUILD)/%/started
	$(if $(wildcard $(BUILD)/$*/runs/tuned/checkpoints/*),$(TUNE) --resume $(BUILD)/$*/runs/tuned,\
		rm -rf $(BUILD)/$*/runs && $(TUNE) --config data_prep/builtin_model/tune.toml \
		--set data=$(BUILD)/$*/dataset teaching=$(BUILD)/$*/start out=$(BUILD)/$*/runs \
		start=$(BUILD)/$*/start name=tuned $(TUNE_$*))
	touch $@

$(BUILD)/%/made: $(BUILD)/%/tuned
	$(RECIPE).recipe pack $(BUILD)/$*/runs/tuned --mix $(BUILD)/$*/start --out $(BUILD)/$*/model
	touch $@
