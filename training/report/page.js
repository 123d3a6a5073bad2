// SPDX-License-Identifier: Apache-2.0
for (const figure of document.querySelectorAll('.chart')) {
  const svg = figure.querySelector('svg');
  if (!svg) continue;
  const data = JSON.parse(figure.dataset.chart), tip = figure.querySelector('.tip');
  const hair = svg.querySelector('.hair');
  const show = (event) => {
    const box = svg.getBoundingClientRect(), scale = data.total / box.width;
    const at = ((event.clientX - box.left) * scale - data.left) / data.width * data.end;
    const distance = (x) => Math.abs(x - at);
    const nearest = (xs) => xs.reduce((best, x, i) => distance(x) < distance(xs[best]) ? i : best, 0);
    const first = data.curves[0].x, kimg = first[nearest(first)];
    const lines = data.curves.map(curve => curve.label + ': ' + curve.y[nearest(curve.x)]);
    tip.textContent = ['kimg ' + kimg, ...lines].join('\n');
    const x = data.left + kimg / data.end * data.width;
    hair.setAttribute('x1', x);
    hair.setAttribute('x2', x);
    hair.style.display = tip.style.display = 'block';
    const outer = figure.getBoundingClientRect(), pixel = box.left - outer.left + x / scale + 12;
    tip.style.top = box.top - outer.top + 'px';
    tip.style.left = Math.max(0, Math.min(pixel, figure.clientWidth - tip.offsetWidth - 8)) + 'px';
  };
  svg.addEventListener('pointermove', show);
  svg.addEventListener('pointerleave', () => { hair.style.display = tip.style.display = 'none'; });
}
const dialog = document.querySelector('dialog');
document.addEventListener('click', (event) => {
  if (dialog.open) return dialog.close();
  if (event.target.tagName !== 'IMG') return;
  dialog.querySelector('img').src = event.target.src;
  dialog.showModal();
});
