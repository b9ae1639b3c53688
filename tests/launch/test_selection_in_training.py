"""What the trainer reports of selection, memory loss and log, against dense biases of the same model and rows."""

import json

import pytest
import torch

import ringattn
from launch.config import Config
from launch.data import open_corpus
from launch.errors import EXIT_DONE
from launch.metrics import read_metrics
from launch.model_shape import model_of
from model.decoder import Decoder
from ringattn.scoring.pieces import all_pieces
from ringattn.testing import dense_attention, memory_cost, selection_bias, visibility
from tests.launch.runs import SEQ_LEN, settings, train_worker, write_corpus
from tests.processes import run_ranks

EPS, TAU, ROWS, STEPS = 0.3, 2.0, 2, 4
LOOKS = [1, 2, 4]  # the first step, and every second one
BOUNDS = (1, 5, 20)


def run(corpus, folder, **changes):
    nested = settings(
        corpus,
        folder,
        optim__steps=STEPS,
        optim__rows_per_step=ROWS,
        optim__lr=1e-12,  # so that the first weights are those of every step
        metrics__selection_every_steps=2,
        data__held_out_rows=1,
        **changes,
    )
    chosen = {"selection": True, "selection_head": 1, "selection_gain": 0.5}
    nested["model"] |= chosen | {"selection_memory_eps": EPS, "selection_memory_tau": TAU}
    return nested


class DenseAttention:
    """A row's attention with an N x N matrix; keeps F [T, T] of each layer."""

    def __init__(self, documents):
        self.documents = documents
        self.biases = []

    def __call__(self, q, k, v, *, selection):
        self.biases.append(selection_bias(q, k, selection, documents=self.documents)[0])
        return dense_attention(q, k, v, selection=selection, documents=self.documents)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The metrics file by ring size; two processes are two rings of one, or one ring of two that recomputes."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder)
    runs = [run(corpus, folder / str(cp), parallel__cp=cp, memory__recompute=cp == 2) for cp in (1, 2)]
    assert run_ranks(train_worker, 2, runs) == [[EXIT_DONE] * 2] * 2
    return {cp: folder / str(cp) / "metrics.jsonl" for cp in (1, 2)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(row, F [T, T] of each layer in float64) of all rows of the run, by the definition."""
    folder = tmp_path_factory.mktemp("dense")
    config = Config(**run(write_corpus(folder), folder))
    corpus = open_corpus(
        config.data, seed=config.run.seed, cache_dir=folder / "data", leader=True, barrier=lambda: None
    )
    decoder = Decoder(model_of(config))
    decoder.init_weights(config.run.seed)
    decoder.double()
    found = []
    for index in range(STEPS * ROWS):
        row = corpus.row(index)
        attention = DenseAttention(row.documents.tolist())
        with torch.no_grad():
            decoder(row.tokens[None], row.labels[None], torch.arange(SEQ_LEN), attention, SEQ_LEN)
        found.append((row, attention.biases))
    return found


def starts_of(documents):
    """[T]: where the document of each position begins."""
    return torch.tensor([max(start for start in documents[:-1] if start <= i) for i in range(SEQ_LEN)])


def memory_loss(rows):
    """Of one step, per valid token: eps * valid * sum over layers of max_i M_i / (layers * T), summed over rows."""
    total = 0.0
    for row, biases in rows:
        documents = row.documents.tolist()
        age = torch.arange(SEQ_LEN) - starts_of(documents)
        visible = visibility(SEQ_LEN, documents=documents)
        held = sum(float((age - memory_cost(bias[None], visible, TAU)[0]).max()) for bias in biases)
        total += EPS * row.num_valid * held / (len(biases) * SEQ_LEN)
    return total / sum(row.num_valid for row, _ in rows)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_memory_loss_is_that_of_the_dense_bias(trained, rows, cp_size):
    records = read_metrics(trained[cp_size])
    assert len(records) == STEPS
    for step, record in enumerate(records):
        of_step = rows[step * ROWS : (step + 1) * ROWS]
        assert record["memory_loss_nats_per_token"] == pytest.approx(memory_loss(of_step), rel=1e-5)
        assert record["valid_tokens"] == sum(row.num_valid for row, _ in of_step)
    assert any(rows[n][0].num_valid != rows[n + 1][0].num_valid for n in range(0, STEPS * ROWS, ROWS))


def seen_by_samples(row, bias, cp_size):
    """(distances and F of all pairs of a sampled query and an earlier key that it sees, number of sampled queries)."""
    documents = row.documents.tolist()
    firsts = starts_of(documents)
    queries = [piece.start for piece in all_pieces(ringattn.Plan(SEQ_LEN, cp_size), 1, parts=4)]
    pairs = [(i - j, float(bias[i, j])) for i in queries for j in range(int(firsts[i]), i)]
    return pairs, len(queries)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_log_shows_every_layer_s_dense_bias_on_the_right_steps(trained, rows, cp_size):
    lines = [json.loads(line) for line in trained[cp_size].read_text().splitlines()]
    events = [line for line in lines if line.get("event") == "selection"]
    assert [(event["step"], event["layer"]) for event in events] == [
        (step, layer) for step in LOOKS for layer in (0, 1)
    ]
    for event in events:
        row, biases = rows[(event["step"] - 1) * ROWS]  # the step's first
        pairs, queries = seen_by_samples(row, biases[event["layer"]], cp_size)
        means = {}
        for power in range(8):
            found = [bias for distance, bias in pairs if 4**power <= distance < 4 ** (power + 1)]
            if found:
                means[f"mean_bias_at_{4**power}_tokens"] = sum(found) / len(found)
        assert len(means) >= 3  # distances 1, 4 and 16 at least
        alive = {f"alive_below_{bound}_keys": sum(bias < bound for _, bias in pairs) / queries for bound in BOUNDS}
        expected = {**means, **alive, "visible_keys": len(pairs) / queries}
        shown = {name: event[name] for name in event if name.startswith(("mean_", "alive_", "visible_"))}
        assert shown == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # otherwise the counts would agree whatever was counted
    counts = [[event[f"alive_below_{bound}_keys"] for bound in BOUNDS] + [event["visible_keys"]] for event in events]
    assert any(count == sorted(set(count)) for count in counts)
