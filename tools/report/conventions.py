"""What every number of the report means, in words that the report itself carries."""

from __future__ import annotations

from tools.report.derive import RESTLESS_CORES, RESTLESS_SPREAD, SESSION_HOURS
from tools.report.model import Report
from tools.report.summary import DISTURBED, OTHER_CODE, OTHER_GPU, OTHER_MEMORY, in_gib

_HOST = (
    "peak resident memory of the largest process until the last timed step: the more of what it took while the model "
    "was built and warmed up, and what it took in the timed steps."
)
_ANEW = (
    "by today's planner, that of the code which rendered this report, for each row's own machine: in the sentence "
    "above, in brackets in the table, dashed in the plots and in the CSV. The records keep what the planner of the "
    "row's day foresaw. No prediction where today's would choose other settings of memory than the row had, and no "
    "time on a CPU or where documents are kept; points that were not measured have those of their day. "
)


def conventions(report: Report) -> list[tuple[str, str]]:
    """(term, meaning) of every number of the report."""
    cuda = report.on_gpu
    unit = "GPU" if cuda else "core in use"
    pairs = sorted({tuple(sorted((row.gpu, other))) for row in report.rows for other in row.across.values()})
    return [
        (
            "Attention",
            "softmax; selective: selective attention in its exact form; lagged 128: votes count at multiples of 128; "
            "SAS r=2: simulated scores of twice the heads. Rival: transformers + FSDP2 + torch's context_parallel.",
        ),
        (
            "Step",
            "reading the row, forward, backward, gradient norm, clipping and AdamW update of one row, by the trainer's "
            "own code, from random weights on the standard library's sources; one process per rank, no other "
            "parallelism, so that cp 1 is one process alone.",
        ),
        (
            "Step time",
            "of the slowest process; median of the timings. A timing is a step, on CPUs the mean of as many as fill "
            "half a second; the spread is (slowest - fastest timing) / median. A warm-up step goes before, on a row "
            "of the same length, above 262,144 tokens on one of 32,768.",
        ),
        (
            "Other work",
            "CPU cores that other processes kept busy during the timings, on average. A point is marked as disturbed "
            f"({DISTURBED}) where that is over {RESTLESS_CORES:.0%} of the cores it uses, or its spread over "
            f"{RESTLESS_SPREAD:.0%}. Behind a comparison the mark says that the row compared with is such a point (in "
            "the CSV: unsound). The pictures of comparisons draw none with a disturbed point on either side.",
        ),
        ("Lengths", "k is 1,024 tokens and M 1,048,576, on axes and in headlines."),
        (
            f"Tokens/s per {'GPU' if cuda else 'core'}",
            f"length / step time / number of {'GPUs' if cuda else 'cores in use'}.",
        ),
        (
            "FLOPs and MFU",
            "multiply and add counted as two; matrix products only; backward twice the forward; nothing for "
            "recomputation. Causal counts the keys a query may see, (T + 1) / 2 on average; full counts all T. MFU "
            "divides by the device's dense peak and is left out where that is not known.",
        ),
        (
            "Cost of cp, same tokens per rank",
            f"1 - FLOP/s per {unit} / those of cp 1 on a row that is cp times shorter, each process with as many "
            "tokens as here: what cutting the row costs each of them. Counted in causal FLOPs, as a longer row has "
            "more of them per token.",
        ),
        (
            "Cost of cp, same length",
            f"1 - tokens/s per {unit} / those of cp 1 on a row of the same length: what is lost of a perfect "
            f"{'speed-up by more GPUs' if cuda else 'division of the cores'}. Below 0: faster than that. Both compare "
            "the fastest measured settings of memory, which may differ: a shorter row can keep more, and cp 1 has to "
            "recompute or move more of a row as long, which is time that its cost is too small by; of cp 1 those of "
            "the row's own commit, where there are any.",
        ),
        ("Against softmax", "step time / that of our softmax at the same length and cp; FLOPs may differ."),
        (
            "Compared rows",
            "have in common all settings but those that are compared and those of memory: rows of a model with fewer "
            "layers are compared with each other alone. Where one was measured on several GPUs, the same GPU's "
            "is taken, and costs of cp are told between equal GPUs alone. Where it was measured several times, taken "
            f"is of those within {SESSION_HOURS} hours of the row, else nearest in time to it, the fastest: most "
            f"likely of the same machine and code.{_mixed(report)}",
        ),
        *(
            [
                (
                    OTHER_GPU,
                    f"the two compared rows ran on different GPUs ({'; '.join(' and '.join(pair) for pair in pairs)}), "
                    "so that part of the difference may be theirs.",
                )
            ]
            if pairs
            else []
        ),
        *(
            [
                (
                    OTHER_CODE,
                    "the two compared rows were measured with different versions of the code (commits), so that part "
                    "of the difference may be theirs; or one has no commit recorded, and they were measured "
                    f"{SESSION_HOURS} hours apart or more.",
                )
            ]
            if any(row.other_code for row in report.rows)
            else []
        ),
        *(
            [
                (
                    OTHER_MEMORY,
                    "a cost of cp where the row of cp 1 has other settings of memory: what one of the two runs again "
                    "or moves, and the other does not, is part of the cost, or hides it.",
                )
            ]
            if any(row.other_memory for row in report.rows)
            else []
        ),
        (
            "Peak memory",
            "GPU, torch: peak of torch's allocator in the timed steps. GPU, all: everything in use on the GPU at that "
            "peak, with what the allocator keeps for later, NCCL, peer buffers and the context. "
            if cuda
            else "of the largest process, libraries and the time while the model is built included."
            " Predicted stands beside it.",
        ),
        *([("Host memory", _HOST)] if cuda else []),
        (
            "Exposed communication",
            "time in which attention stood waiting for a message of the ring, mean over processes; a slower "
            "neighbour's lateness is part of it. Empty where hops run inside CUDA graphs, which nobody can time.",
        ),
        (
            "Predicted",
            (_ANEW if report.anew else "by the planner before the step, in brackets in the table (on a CPU no times). ")
            + "Memory settings are the planner's choice (memory: auto) unless the settings say otherwise.",
        ),
        *([("Repeated points", _repeated(len(report.not_shown)))] if report.not_shown else []),
        (
            "Longest context",
            "measured: the longest row of this report that trained a step. Planned: the longest row that the planner "
            f"says fits a machine of {in_gib(report.machine) or 'memory that nobody told'} with any settings, each "
            "process with its share of the host's memory; computed, not run. It is one machine for all kinds, the "
            "smallest where rows are of several; of hosts the smallest of those where the largest ring ran. Where more "
            "was trained than is planned, it is said why.",
        ),
        (
            "Loss difference",
            "relative difference of the first loss from that of cp 1 at the same length: a check that the ring "
            "computes the same thing. The first loss is the warm-up's: nothing is compared where a warm-up ran on a "
            "shorter row.",
        ),
    ]


def _mixed(report: Report) -> str:
    """What else sets the points of a report of several machines apart."""
    told = ""
    if len({row.gpu for row in report.rows}) > 1:
        told += (
            " The pictures draw the fastest row of each length, so that a line may be of several GPUs; those of costs "
            "the fastest whose cp 1 was measured on its GPU."
        )
    if len({step.machine for step in report.steps}) > 1:
        told += (
            " Machines differ beside the GPU, or are not recorded (see below): how long a short row waits for its "
            "host may be part of a difference that no mark tells."
        )
    return told


def _repeated(not_shown: int) -> str:
    rows, are = ("row", "is") if not_shown == 1 else ("rows", "are")
    return (
        f"{not_shown} earlier or shorter {rows} of the same cases {are} not shown: a row that was measured stands "
        "before one that failed, one of more timings before one of fewer, and else the later one, whether it is faster "
        "or slower. All runs: the fastest and the slowest of those that were measured, the one shown included, on "
        "whatever machine with that GPU and by whatever version of the code. Pictures are of the run shown; costs of "
        "cp in the sentences tell what the other runs would make of them. Another row may be compared with a run that "
        "is not shown, see Compared rows."
    )
