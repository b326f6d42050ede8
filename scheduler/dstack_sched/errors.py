"""One root for every error that a user can cause or mend.

The command line prints `str(error)` as one line and exits with `exit_status`; anything that is not a
DstackError is a defect and shows its traceback.
"""


class DstackError(Exception):
    """Base: one line that names the thing, what was wanted, and the mend."""

    exit_status = 2


class InputError(DstackError):
    """A config, model, profile, workload, plan or option cannot be used as it is."""


class PlanRefusedError(InputError):
    """A plan could not be put in force because of one model, say because it does not load with its new
    config. All is as before, unless the text says otherwise."""

    def __init__(self, model: str, text: str) -> None:
        super().__init__(text)
        self.model = model

    @property
    def by_server(self) -> bool:
        """Whether Triton refused the model; else something stood in the way that may go by itself."""
        return isinstance(self.__cause__, ServerError)


class MachineError(DstackError):
    """A part of the machine is missing or busy: server, stub, port, GPU, provider."""


class InfeasibleError(DstackError):
    """The thing asked for cannot be had: which model, which limit, how much would fit."""

    exit_status = 1


class ServerError(DstackError):
    """Triton refused or failed a request of ours; the old state is back in force."""

    exit_status = 1


class SolverError(DstackError):
    """The optimiser stopped without an answer although the problem looks feasible (numerical failure)."""

    exit_status = 1
