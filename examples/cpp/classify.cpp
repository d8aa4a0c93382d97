// classify MODEL IMAGES: runs a scripted classifier on images that Python saved, without Python, and compares the
// classes with Python's. The demo builds and runs it (examples/digits_vit/cpp_check.py).
//
// MODEL is from torch.jit.save; IMAGES from torch.save({"images": ..., "predictions": ...}).
#include <torch/script.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

c10::Dict<c10::IValue, c10::IValue> load_dict(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return torch::jit::pickle_load(bytes).toGenericDict();
}

// Linking torch_attn registered its operators; the dispatcher finds them by name.
int64_t kernel_calls() {
  return c10::Dispatcher::singleton().findSchemaOrThrow("torch_attn::kernel_calls", "").typed<int64_t()>().call();
}

int run(const std::string& model_path, const std::string& images_path) {
  const c10::InferenceMode inference;
  torch::jit::Module model = torch::jit::load(model_path);
  const auto saved = load_dict(images_path);
  const at::Tensor expected = saved.at("predictions").toTensor();
  const at::Tensor classes = model.forward({saved.at("images")}).toTensor().argmax(/*dim=*/1);

  const int64_t equal = classes.eq(expected).sum().item<int64_t>();
  std::cout << equal << " of " << expected.numel() << " answers equal Python's (" << kernel_calls()
            << " calls of torch_attn's kernels from C++)\n";
  return equal == expected.numel() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: classify MODEL IMAGES\n";
    return 2;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << '\n';
    return 2;
  }
}
