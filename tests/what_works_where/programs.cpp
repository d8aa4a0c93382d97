// programs PACKAGE SCRIPT INPUTS ANSWERS SEED: runs an AOTInductor package and a scripted model, both made by Python,
// on each tensor of the list INPUTS, and writes to ANSWERS, one after another for each input: the package's outputs;
// the scripted model's and the gradients, by input and by parameters, of the sum of their sines; the outputs of the
// scripted model when frozen, and when optimised for inference. Built and run by test_cpp.py.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& tensor : list.toListRef()) tensors.push_back(tensor.toTensor());
  return tensors;
}

void write(const std::vector<at::Tensor>& tensors, const std::string& path) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensors);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::vector<at::Tensor> outputs_and_gradients(torch::jit::Module& model, const at::Tensor& x) {
  std::vector<at::Tensor> differentiated = {x.clone().requires_grad_()};
  for (const at::Tensor& parameter : model.parameters()) differentiated.push_back(parameter);
  std::vector<at::Tensor> results = model.forward({differentiated[0]}).toTensorVector();
  at::Tensor loss = at::zeros({});
  for (at::Tensor& output : results) {
    loss = loss + output.sin().sum();
    output = output.detach();
  }
  const auto gradients = torch::autograd::grad({loss}, differentiated);
  results.insert(results.end(), gradients.begin(), gradients.end());
  return results;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  torch::jit::Module scripted = torch::jit::load(argv[2]);
  scripted.eval();
  torch::jit::Module frozen = torch::jit::freeze(scripted);
  torch::jit::Module model = scripted.clone();
  torch::jit::Module optimized = torch::jit::optimize_for_inference(model);

  std::vector<at::Tensor> answers;
  const auto append = [&answers](const std::vector<at::Tensor>& more) {
    answers.insert(answers.end(), more.begin(), more.end());
  };
  const auto reseed = [&argv] { at::manual_seed(std::stoull(argv[5])); };
  for (const at::Tensor& x : read(argv[3])) {
    reseed();
    append(package.run({x}));
    reseed();
    append(outputs_and_gradients(scripted, x));
    const at::NoGradGuard no_grad;
    reseed();
    append(frozen.forward({x}).toTensorVector());
    reseed();
    append(optimized.forward({x}).toTensorVector());
  }
  write(answers, argv[4]);
}
