# Debian's ruby-aws-sdk-core: the default chain first, then the same object's refresh, which keeps
# its metadata token.
require 'aws-sdk-core'
require 'json'

TIMEOUT = Float(ENV.fetch('FETCH_TIMEOUT', '20'))

def report(fields)
  line = { client: 'ruby', ok: false, access_key_id: '', expiration: '', seconds: 0, error: '' }
  $stdout.puts(JSON.generate(line.merge(fields)))
  $stdout.flush
end

credentials = nil
loop do
  watchdog = Thread.new do
    sleep TIMEOUT
    report(seconds: TIMEOUT, error: "hang: no result within #{TIMEOUT} s")
    exit!(3)
  end
  start = Process.clock_gettime(Process::CLOCK_MONOTONIC)
  begin
    if credentials
      credentials.refresh!
    else
      credentials = Aws::CredentialProviderChain.new.resolve
    end
    raise Aws::Errors::MissingCredentialsError unless credentials&.set?

    fields = { ok: true, access_key_id: credentials.credentials.access_key_id, expiration: credentials.expiration.to_s }
  rescue StandardError => e
    fields = { error: "#{e.class}: #{e.message}" }
  end
  watchdog.kill
  report(fields.merge(seconds: (Process.clock_gettime(Process::CLOCK_MONOTONIC) - start).round(3)))
  break unless $stdin.gets
end
