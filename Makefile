.PHONY: test deep peers lint type bench docs power

test:  ## what every change has to pass
	python -m pytest

deep:  ## all proofs, and Hypothesis with its deep profile
	python -m pytest -m "slow or not slow" --hypothesis-profile=deep

peers:  ## against installed libraries: pip install torch==2.13.0 '.[peers]'
	python -m pytest -m "slow or not slow" tests/peers

lint:
	ruff check .

type:
	mypy --strict npattn benchmarks

bench:  ## beside other libraries on this machine, an hour; --quick for a look
	python -m benchmarks

docs:  ## every example in the documents and docstrings
	python -m pytest tests/test_docs.py

power:  ## what verify keeps of its own power, after a change of a case, a known mistake or the error model
	python -c "from npattn.verify.power import write; write()"
