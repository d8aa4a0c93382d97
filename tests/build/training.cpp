// training MODEL: gradient descent on a scripted model whose attention is torch_attn's, without Python; prints the loss
// of each step, the norm of the gradient of a gradient penalty, and the norm of what an operator gives that is called
// as docs/cpp.md shows. Built and run by test_cpp_training.py, which
// does the same in Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/script.h>

#include <cstdio>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  torch::jit::Module model = torch::jit::load(argv[1]);
  std::vector<at::Tensor> parameters;
  for (const at::Tensor& parameter : model.parameters()) parameters.push_back(parameter);
  const at::Tensor x = at::linspace(-1, 1, 2 * 9 * 16, at::kDouble).view({2, 9, 16}).sin();

  for (int step = 0; step < 5; ++step) {
    const at::Tensor loss = model.forward({x}).toTensor().square().mean();
    const auto gradients = torch::autograd::grad({loss}, parameters);
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < parameters.size(); ++i) parameters[i].sub_(gradients[i], 0.5);
    std::printf("%.12f\n", loss.item<double>());
  }

  const at::Tensor input = x.clone().requires_grad_();
  const at::Tensor sum = model.forward({input}).toTensor().square().sum();
  const at::Tensor gradient = torch::autograd::grad({sum}, {input}, {}, std::nullopt, /*create_graph=*/true)[0];
  const at::Tensor penalty_gradient = torch::autograd::grad({gradient.square().sum()}, {input})[0];
  std::printf("%.12f\n", penalty_gradient.norm().item<double>());

  const auto attention =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torch_attn::scaled_dot_product_attention", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            double, bool, std::optional<double>, bool)>();
  const at::Tensor heads = x.view({2, 9, 2, 8}).transpose(1, 2);
  const at::Tensor out = attention.call(heads, heads, heads, /*attn_mask=*/std::nullopt, /*dropout_p=*/0.0,
                                        /*is_causal=*/true, /*scale=*/std::nullopt, /*enable_gqa=*/false);
  std::printf("%.12f\n", out.norm().item<double>());
}
