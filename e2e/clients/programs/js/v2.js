// aws-sdk v2: its default chain's last link, then the same object's refresh. No logger is set, as
// in most programs: that is where a document with a bad Code or a past expiry never calls back.
'use strict';
process.env.AWS_SDK_JS_SUPPRESS_MAINTENANCE_MODE_MESSAGE = '1';
const AWS = require('aws-sdk');
const { run } = require('./contract');

const credentials = new AWS.EC2MetadataCredentials();

run('js-v2', () => new Promise((resolve, reject) => {
  credentials.refresh((err) => (err ? reject(err) : resolve({
    accessKeyId: credentials.accessKeyId, expiration: credentials.expireTime,
  })));
}));
