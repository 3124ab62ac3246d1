// `npx eslint aopsam_lab/widgets` checks the explorer's modules.

const BROWSER = [
  "Blob", "ImageData", "Option", "Path2D", "ResizeObserver", "URL", "clearInterval", "clearTimeout",
  "createImageBitmap", "document", "navigator", "requestAnimationFrame", "setInterval",
  "setTimeout", "window",
];

export default [{
  files: ["**/*.js"],
  languageOptions: { globals: Object.fromEntries(BROWSER.map((name) => [name, "readonly"])) },
  rules: {
    "eqeqeq": "error", "no-undef": "error", "no-unused-vars": "error",
  },
}];
