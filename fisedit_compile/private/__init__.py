"""Private names of other libraries: the only folder that may use any, so that a new release is checked in one place.

A file holds what one part of a library keeps for itself, and nothing that is decided about it: that stands where it is
used. Supported are PyTorch 2.11 and newer.

* ``tensors``, ``operators``, ``modules``, ``cuda``: objects of PyTorch. Cheap to import.
* ``graphs``: tracing to functional graphs, fake tensors, symbols, dispatch modes. ``dynamo``: PyTorch's compiler.
  ``inductor``: its code generator. They take seconds to import. ``onednn``: its products with packed weights.
* ``diffusers``: pipelines and networks of diffusers. ``accelerate``: hooks that move networks between devices.
"""
