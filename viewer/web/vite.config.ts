import { defineConfig } from "vite";

// One script and one style sheet with names that stay the same from build to build: the built files stand in the
// repository, and the export puts both into one page. `polyturn view` serves them; while developing, `npm run dev`
// passes calls of the API on to it.
export default defineConfig({
  base: "./",
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../assets",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: false,
    cssCodeSplit: false,
    target: "es2022",
    rolldownOptions: {
      output: { format: "iife", entryFileNames: "viewer.js", assetFileNames: "viewer[extname]" },
    },
  },
  server: { proxy: { "/api": "http://127.0.0.1:8265" } },
});
