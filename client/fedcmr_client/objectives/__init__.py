"""What families of networks learn from a patient: examples and their loss.

One module for each family, all behind :class:`~fedcmr_client.objectives.interface.Objective`.
"""

from fedcmr_client.objectives.choice import checking_objective, training_objective
from fedcmr_client.objectives.interface import Objective
from fedcmr_client.objectives.reconstruction import ReconstructionObjective

__all__ = ["Objective", "ReconstructionObjective", "checking_objective", "training_objective"]
