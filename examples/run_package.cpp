/* Runs a model that AOTInductor has packaged, with layers of fastrnn in it, without Python: libfastrnn.so brings the
   ops, and needs libtorch alone.

       run_package PACKAGE.pt2 INPUTS.pt OUTPUTS.pt

   INPUTS.pt is what torch.save has written of a list of tensors; OUTPUTS.pt, a tuple, is for torch.load.

       TORCH=$(python -c "import torch, os; print(os.path.dirname(torch.__file__))")
       FASTRNN=$(python -c "import fastrnn, os; print(os.path.dirname(fastrnn.__file__))")
       g++ -std=c++20 -I$TORCH/include -I$TORCH/include/torch/csrc/api/include run_package.cpp -o run_package \
           -L$TORCH/lib -L$FASTRNN -Wl,-rpath,$TORCH/lib,-rpath,$FASTRNN \
           -Wl,--no-as-needed -lfastrnn -ltorch -ltorch_cpu -lc10

   --no-as-needed, since the program calls nothing of libfastrnn.so itself: it is loaded, and PyTorch knows the ops. A
   program that is not linked to it may dlopen it before it loads a package. */
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package PACKAGE.pt2 INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  try {
    std::ifstream file(argv[2], std::ios::binary);
    if (!file) throw std::runtime_error(std::string("cannot read ") + argv[2]);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    const c10::IValue list = torch::jit::pickle_load(bytes);
    if (!list.isList()) throw std::runtime_error(std::string(argv[2]) + ": expected a list of tensors");
    std::vector<at::Tensor> inputs;
    for (const c10::IValue& input : list.toListRef()) inputs.push_back(input.toTensor());
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const std::vector<at::Tensor> outputs = model.run(inputs);
    const auto tuple = c10::ivalue::Tuple::create(std::vector<c10::IValue>(outputs.begin(), outputs.end()));
    const std::vector<char> written = torch::jit::pickle_save(tuple);
    std::ofstream target(argv[3], std::ios::binary);
    target.write(written.data(), std::streamsize(written.size()));
    target.close();
    if (!target) throw std::runtime_error(std::string("cannot write ") + argv[3]);
    std::cout << outputs.size() << " outputs\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
