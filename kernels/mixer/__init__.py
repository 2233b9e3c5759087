"""Everything of a Lattice layer between its input and its output projection, as one operation."""

from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.reference import MixerState, mix
from lattice_serve.kernels.mixer.segments import DeviceSegments, Segments
from lattice_serve.kernels.mixer.shape import MixerShape, MixerWeights

__all__ = ["DeviceSegments", "MixerShape", "MixerState", "MixerWeights", "Segments", "StateLayout", "mix"]
