# demo: see it work · test: prove it · lint · bench: measure it · docs · clean
BIN := .venv/bin
.PHONY: demo test lint bench docs clean

demo:
	@scripts/setup demo
	@$(BIN)/retryproof demo

test:
	@scripts/setup dev
	@scripts/services install
	@scripts/test $(ARGS)

# import-linter's cache takes an import of a module that was added later for one of the whole package.
lint:
	@scripts/setup dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src tests scripts
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/check_release.py

bench:
	@scripts/setup dev
	@scripts/services install
	@$(BIN)/python benchmarks/run.py $(ARGS)

docs:
	@scripts/setup dev
	@for page in draw_protocol draw_endings api_reference rules_index; do $(BIN)/python scripts/$$page.py --write || exit 1; done
	@$(BIN)/python -m pytest tests/docs

clean:
	@scripts/services down
	rm -rf .venv .services build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
