// node screenshot.mjs FOLDER URL...  writes FOLDER/<board>.png of each URL's ?board=; exit status 1 when a page had faults.
import { chromium } from 'playwright-core';

const [folder, ...urls] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
let status = 0;
for (const url of urls) {
  const name = new URL(url).searchParams.get('board');
  const page = await browser.newPage({ viewport: { width: 1400, height: 900 } });
  const faults = [];
  page.on('console', (message) => message.type() === 'error' && faults.push(message.text().slice(0, 300)));
  page.on('pageerror', (error) => faults.push(String(error.stack).slice(0, 500)));
  await page.goto(url);
  await page.waitForFunction(() => document.title.startsWith('done'), null, { timeout: 60000 });
  await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
  const title = await page.title();
  console.log(`${name}: ${title}`);
  if (title !== 'done, 0 faults') {
    status = 1;
    faults.forEach((fault) => console.log(`  ${fault}`));
  }
  await page.close();
}
await browser.close();
process.exit(status);
