"""Turn an ImageNet ResNet-101 or the public COCO checkpoint into a start file for DeepLabV2: safetensors, Caffe names.

    python tools/weights/deeplab.py resnet101-63fe2227.pth imagenet_caffe.safetensors         # torchvision's, or timm's with its mean and std
    python tools/weights/deeplab.py deeplabv1_resnet101-coco.pth coco_caffe.safetensors       # the two-star rows
    python tools/weights/deeplab.py timm imagenet_caffe.safetensors                           # let timm download torchvision's

`adcam.deeplab.init_deeplab(net, path)` reads the original files as well; a converted one is for machines without pickle
files, and for a look at what is inside. What the conversion changes is printed. Weights are never committed.
"""
import argparse
from pathlib import Path
from safetensors.torch import save
from adcam.deeplab import DeepLabV2, init_deeplab
from adcam.scenes import atomic_write


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file of torchvision, timm or the COCO checkpoint; or the word timm")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--classes", type=int, default=21, help="classes of the network, background included; ASPP is kept if the file has as many")
    args = parser.parse_args()
    if args.out.exists(): parser.error(f"{args.out} exists; choose another name")
    net = DeepLabV2(args.classes)
    notes = init_deeplab(net, args.source)
    new = any("ASPP starts from random weights" in n for n in notes)
    state = {k: v.contiguous() for k, v in net.state_dict().items() if not (new and k.startswith(net.head))}
    atomic_write(args.out, lambda f: f.write(save(state)))
    print(*notes, f"{len(state)} tensors in {args.out}", sep="\n")


if __name__ == "__main__": main()
