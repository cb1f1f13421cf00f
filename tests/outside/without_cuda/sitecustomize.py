"""Make torchvision importable with a torch without CUDA: PyPI's build contains operators that need CUDA's libraries.

Python runs this file at start-up if this folder is on PYTHONPATH. It declares only the two operators that torchvision
describes when it is imported; nothing here calls them.
"""

import sys
from importlib.abc import MetaPathFinder


class DeclareOperators(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["torchvision_operators"] = self.library  # keeps them alive


sys.meta_path.insert(0, DeclareOperators())
