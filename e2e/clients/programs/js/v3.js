// The AWS SDK v3's metadata client. The function is what a v3 client calls when its cached
// credentials are due, so calling it again is a refresh.
'use strict';
const { fromInstanceMetadata } = require('@smithy/credential-provider-imds');
const { run } = require('./contract');

run('js-v3', fromInstanceMetadata());
