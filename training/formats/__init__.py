# SPDX-License-Identifier: Apache-2.0
"""Files that hold networks: pickles, safetensors, TensorFlow and rosinality layouts, ONNX, torch.export."""
