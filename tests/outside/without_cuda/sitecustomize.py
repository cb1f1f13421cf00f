"""Let torchvision be imported beside a torch without CUDA: PyPI's build holds operators that need CUDA's libraries.

Python runs this file at its start where this folder is on PYTHONPATH. Only the two operators that torchvision describes
when it is imported are declared; nothing here calls them.
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
            sys.modules["torchvision_operators"] = self.library  # or they end with this object


sys.meta_path.insert(0, DeclareOperators())
