// Environment: PROMETHEUS_URL, PORT, BOARDS (folder of dashboard JSON), BUILD (where the bundle goes).
import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

const { PROMETHEUS_URL, PORT, BOARDS, BUILD } = process.env;
const served = { host: '127.0.0.1', port: Number(PORT), strictPort: true, proxy: { '/api': { target: PROMETHEUS_URL } } };
export default defineConfig({
  plugins: [react()],
  define: { 'process.env': {}, global: 'globalThis' },
  publicDir: BOARDS,
  preview: served,
  build: { outDir: BUILD, emptyOutDir: true, minify: false, sourcemap: false, chunkSizeWarningLimit: 99999 },
});
