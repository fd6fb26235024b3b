package sts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	awssts "github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go/logging"
	smithymiddleware "github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/imdsgate/imdsgate/cache"
)

// Two attempts and the pause between them end within 10 s, which is what the cache gives an issue.
const (
	attempts       = 2
	attemptTimeout = 4 * time.Second
	attemptPause   = 250 * time.Millisecond // at most; half of it at least
)

// chainedDuration is what STS allows every role, also one assumed by role chaining.
const chainedDuration = time.Hour

// Keys of EKS Pod Identity's session tags.
const (
	tagClusterName    = "eks-cluster-name"
	tagNamespace      = "kubernetes-namespace"
	tagServiceAccount = "kubernetes-service-account"
)

// Names of operations: values of the label operation.
const (
	opAssumeRole        = "AssumeRole"
	opWebIdentity       = "AssumeRoleWithWebIdentity"
	opGetCallerIdentity = "GetCallerIdentity"
)

// TokenSource has web identity tokens of service accounts. It is called once per issue and is safe for concurrent use. Its
// error names the service account and is shown to the pod.
type TokenSource interface {
	Token(ctx context.Context, namespace, serviceAccount, audience string) (string, error)
}

// Options of an STS. Where nothing is said the zero value will do.
type Options struct {
	WebIdentity bool        // AssumeRoleWithWebIdentity instead of AssumeRole
	Tokens      TokenSource // needed with WebIdentity

	// IntermediateRoleARN is assumed first, with the node's credentials, and then used to assume the pods' roles. Sessions
	// are then at most 1 h (role chaining). Not with WebIdentity.
	IntermediateRoleARN string
	NodeSessionName     string // of the intermediate role; cut at 64 characters; empty: imdsgate

	Log     *slog.Logger          // nil: nothing is logged
	Metrics prometheus.Registerer // nil: nothing is registered
}

// STS issues credentials. It is safe for concurrent use.
type STS struct {
	webIdentity  bool
	tokens       TokenSource
	client       *awssts.Client
	node         aws.CredentialsProvider // the SDK caches what it has
	intermediate *intermediate           // nil: pods' roles are assumed with the node's credentials
	imds         *imds.Client
	log          *slog.Logger
	metrics      metrics

	cappedMu sync.Mutex
	capped   map[string]struct{} // roles whose capped duration was logged
}

var _ cache.Issuer = (*STS)(nil)

// New reads the SDK's own configuration (environment, shared files) and returns an STS. The only I/O beside reading files is
// one question to the instance metadata endpoint, of at most 2 s, when no region is configured.
func New(ctx context.Context, o Options) (*STS, error) {
	switch {
	case o.WebIdentity && o.Tokens == nil:
		return nil, errors.New("web identity needs a source of tokens")
	case o.WebIdentity && o.IntermediateRoleARN != "":
		return nil, errors.New("an intermediate role cannot be used with web identity")
	}
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m, err := newMetrics(o.Metrics)
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	cfg, err := config.LoadDefaultConfig(ctx,
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTimeout(attemptTimeout)),
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) {
				o.MaxAttempts = attempts
				o.Backoff = retry.BackoffDelayerFunc(func(int, error) (time.Duration, error) {
					return attemptPause/2 + rand.N(attemptPause/2), nil // it spreads retries, it hides nothing
				})
			})
		}),
		config.WithLogger(sdkLogger(log)),
	)
	if err != nil {
		return nil, fmt.Errorf("read the AWS configuration (AWS_CA_BUNDLE, AWS_PROFILE, AWS_CONFIG_FILE): %w", err)
	}
	s := &STS{
		webIdentity: o.WebIdentity,
		tokens:      o.Tokens,
		node:        cfg.Credentials,
		imds:        imds.NewFromConfig(cfg),
		log:         log,
		metrics:     m,
		capped:      make(map[string]struct{}),
	}
	if cfg.Region == "" {
		if cfg.Region, err = s.region(ctx); err != nil {
			return nil, fmt.Errorf("no AWS region is configured and the instance metadata endpoint does not tell one: "+
				"set the environment variable AWS_REGION to the region whose STS is to be used: %w", err)
		}
	}
	s.client = awssts.NewFromConfig(cfg, func(o *awssts.Options) { o.HTTPClient = bounded{o.HTTPClient} })
	if o.IntermediateRoleARN != "" {
		name := o.NodeSessionName
		if name == "" {
			name = "imdsgate"
		}
		key := cache.Key{RoleARN: o.IntermediateRoleARN, SessionName: name[:min(len(name), 64)], Duration: chainedDuration}
		s.intermediate = &intermediate{role: key.RoleARN, log: log, assume: func(ctx context.Context) (aws.Credentials, error) {
			c, err := s.assumeRole(ctx, key, s.node)
			if err != nil {
				return aws.Credentials{}, err
			}
			// The pods' sessions have their line from the cache. In CloudTrail this one has asked for them.
			log.InfoContext(ctx, "intermediate session issued", "role_arn", key.RoleARN, "session_name", key.SessionName,
				"access_key_id", c.AccessKeyID, "expires", c.Expires.UTC(), "sts_request_id", c.RequestID)
			return aws.Credentials{
				AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey(), SessionToken: c.SessionToken(),
				CanExpire: true, Expires: c.Expires, Source: "imdsgate",
			}, nil
		}}
	}
	return s, nil
}

// maxAnswer is many times the longest answer of STS, in bytes.
const maxAnswer = 64 << 10

// bounded keeps whatever answers from filling our memory: the SDK reads all there is.
type bounded struct{ awssts.HTTPClient }

func (b bounded) Do(r *http.Request) (*http.Response, error) {
	resp, err := b.HTTPClient.Do(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// sdkLogger takes the SDK's own few warnings. ClientLogMode is left off, so no request is ever among them.
func sdkLogger(log *slog.Logger) logging.Logger {
	return logging.LoggerFunc(func(c logging.Classification, format string, v ...any) {
		write := log.Debug
		if c == logging.Warn {
			write = log.Warn
		}
		write("aws sdk", "text", oneLine(fmt.Sprintf(format, v...), maxText))
	})
}

// Issue asks STS for a new session. Its error is a *cache.IssueError.
func (s *STS) Issue(ctx context.Context, key cache.Key) (cache.Credentials, error) {
	issue := s.issueAssumeRole
	if s.webIdentity {
		issue = s.issueWebIdentity
	}
	c, err := issue(ctx, key)
	if key.Duration > chainedDuration && durationRefused(err) {
		s.logCapped(key, err)
		key.Duration = chainedDuration
		c, err = issue(ctx, key)
	}
	if err != nil {
		return cache.Credentials{}, asIssueError(err)
	}
	return c, nil
}

func (s *STS) issueAssumeRole(ctx context.Context, key cache.Key) (cache.Credentials, error) {
	return s.assumeRole(ctx, key, s.signer())
}

// signer has the credentials that assume the pods' roles.
func (s *STS) signer() aws.CredentialsProvider {
	if s.intermediate != nil {
		return s.intermediate
	}
	return s.node
}

// assumeRole asks with the credentials that as holds. They are fetched first: a failure to have them is not STS's.
func (s *STS) assumeRole(ctx context.Context, key cache.Key, as aws.CredentialsProvider) (cache.Credentials, error) {
	signer, err := s.retrieve(ctx, as)
	if err != nil {
		return cache.Credentials{}, err
	}
	in := &awssts.AssumeRoleInput{
		RoleArn:         &key.RoleARN,
		RoleSessionName: &key.SessionName,
		DurationSeconds: seconds(key.Duration),
		ExternalId:      optional(key.ExternalID),
	}
	for _, t := range []struct{ key, value string }{
		{tagClusterName, key.Tags.ClusterName},
		{tagNamespace, key.Tags.Namespace},
		{tagServiceAccount, key.Tags.ServiceAccount},
	} {
		if t.value != "" {
			in.Tags = append(in.Tags, types.Tag{Key: &t.key, Value: &t.value})
		}
	}
	var out *awssts.AssumeRoleOutput
	err = s.observe(opAssumeRole, func() (err error) {
		out, err = s.client.AssumeRole(ctx, in, func(o *awssts.Options) {
			o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return signer, nil })
		})
		return err
	})
	if err != nil {
		err := s.failure(opAssumeRole, key, err, "")
		if ownCredentialsRefused(err.Code) {
			invalidate(as)
		}
		return cache.Credentials{}, err
	}
	return s.issued(opAssumeRole, key, out.Credentials, out.AssumedRoleUser, out.ResultMetadata)
}

func (s *STS) issueWebIdentity(ctx context.Context, key cache.Key) (cache.Credentials, error) {
	if key.ExternalID != "" || key.Tags != (cache.Tags{}) {
		return cache.Credentials{}, &cache.IssueError{
			Denied: true,
			Err:    errors.New("web identity takes neither an external ID nor session tags"),
			Hint:   "remove the annotation that asks for them or use the assume-role issuer",
		}
	}
	token, err := s.tokens.Token(ctx, key.Namespace, key.ServiceAccount, key.Audience)
	if err != nil {
		issueErr := asIssueError(err)
		if issueErr.Hint == "" {
			issueErr.Hint = tokenHint
		}
		return cache.Credentials{}, issueErr
	}
	var out *awssts.AssumeRoleWithWebIdentityOutput
	err = s.observe(opWebIdentity, func() (err error) {
		out, err = s.client.AssumeRoleWithWebIdentity(ctx, &awssts.AssumeRoleWithWebIdentityInput{
			RoleArn:          &key.RoleARN,
			RoleSessionName:  &key.SessionName,
			DurationSeconds:  seconds(key.Duration),
			WebIdentityToken: &token,
		})
		return err
	})
	if err != nil {
		return cache.Credentials{}, s.failure(opWebIdentity, key, err, token)
	}
	return s.issued(opWebIdentity, key, out.Credentials, out.AssumedRoleUser, out.ResultMetadata)
}

// issued checks an answer: a server that answers 200 with half of it must not overwrite good credentials, and one that mixes up
// its answers must not give a pod another's.
func (s *STS) issued(op string, key cache.Key, c *types.Credentials, user *types.AssumedRoleUser, meta smithymiddleware.Metadata) (cache.Credentials, error) {
	wrong := ""
	switch {
	case c == nil || aws.ToString(c.AccessKeyId) == "" || aws.ToString(c.SecretAccessKey) == "" ||
		aws.ToString(c.SessionToken) == "" || c.Expiration == nil:
		wrong = "STS answered without complete credentials"
	case user != nil && !sessionOf(key, aws.ToString(user.Arn)):
		wrong = "STS answered with another session's credentials, those of " + oneLine(aws.ToString(user.Arn), maxText/4)
	}
	if wrong != "" {
		return cache.Credentials{}, &cache.IssueError{Err: fmt.Errorf("%s %s: %s", op, oneLine(key.RoleARN, maxText/2), wrong)}
	}
	issued := cache.NewCredentials(*c.AccessKeyId, *c.SecretAccessKey, *c.SessionToken, time.Now(), *c.Expiration)
	issued.RequestID, _ = middleware.GetRequestIDMetadata(meta)
	return issued, nil
}

// sessionOf says whether the ARN that STS has for a session, arn:<partition>:sts::<account>:assumed-role/<role>/<session>, can be
// the key's. STS leaves out the role's path and knows its name in any case. STS-compatible servers have no ARN, or forms of their
// own: what cannot be read is no contradiction.
func sessionOf(key cache.Key, arn string) bool {
	got, asked := strings.SplitN(arn, ":", 6), strings.SplitN(key.RoleARN, ":", 6)
	if len(got) < 6 || len(asked) < 6 {
		return true
	}
	session, ok := strings.CutPrefix(got[5], "assumed-role/")
	if !ok {
		return true
	}
	role, name, _ := strings.Cut(session, "/")
	sameAccount := got[4] == asked[4] || asked[4] == "" // of servers that know no accounts
	return sameAccount && name == key.SessionName && strings.EqualFold(role, asked[5][strings.LastIndexByte(asked[5], '/')+1:])
}

// Check finds out, for -check, whether STS can be reached and accepts the node's credentials, and whether the intermediate
// role can be assumed. With web identity there are none: then any answer at all will do. Its error is a *cache.IssueError.
func (s *STS) Check(ctx context.Context) error {
	if s.webIdentity {
		return s.checkReachable(ctx)
	}
	signer, err := s.retrieve(ctx, s.signer())
	if err != nil {
		return asIssueError(err)
	}
	err = s.observe(opGetCallerIdentity, func() error {
		_, err := s.client.GetCallerIdentity(ctx, &awssts.GetCallerIdentityInput{}, func(o *awssts.Options) {
			o.Credentials = aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return signer, nil })
		})
		return err
	})
	if err != nil {
		return s.failure(opGetCallerIdentity, cache.Key{}, err, "")
	}
	return nil
}

// checkReachable asks for what no server grants, by the one operation that needs no signature, and wants to be refused.
func (s *STS) checkReachable(ctx context.Context) error {
	err := s.observe(opWebIdentity, func() error {
		_, err := s.client.AssumeRoleWithWebIdentity(ctx, &awssts.AssumeRoleWithWebIdentityInput{
			RoleArn:          aws.String("arn:aws:iam::000000000000:role/imdsgate-check"),
			RoleSessionName:  aws.String("imdsgate-check"),
			WebIdentityToken: aws.String("check"),
		})
		return err
	})
	if res, ok := errors.AsType[*smithyhttp.ResponseError](err); err == nil || ok && res.HTTPStatusCode() < 500 {
		return nil
	}
	return s.failure(opWebIdentity, cache.Key{}, err, "")
}

// retrieve has the credentials that sign a request.
func (s *STS) retrieve(ctx context.Context, as aws.CredentialsProvider) (aws.Credentials, error) {
	c, err := as.Retrieve(ctx)
	if err == nil {
		return c, nil
	}
	if issueErr, ok := errors.AsType[*cache.IssueError](err); ok { // the intermediate role was refused
		return aws.Credentials{}, &cache.IssueError{
			Code: issueErr.Code, Denied: issueErr.Denied, Hint: issueErr.Hint,
			Err: &failure{text: oneLine("intermediate role: "+issueErr.Err.Error(), maxText), err: err},
		}
	}
	if ctx.Err() != nil {
		return aws.Credentials{}, &cache.IssueError{Err: fmt.Errorf("no credentials to sign with in time: %w", ctx.Err())}
	}
	return aws.Credentials{}, &cache.IssueError{
		Err:  &failure{text: oneLine("the node has no AWS credentials: "+err.Error(), maxText), err: err},
		Hint: "give the node an instance profile and leave its metadata endpoint on, or use the web-identity issuer, which needs neither",
	}
}

// logCapped says once per role that its sessions are shorter than asked for.
func (s *STS) logCapped(key cache.Key, refusal error) {
	s.cappedMu.Lock()
	_, logged := s.capped[key.RoleARN]
	if !logged {
		if len(s.capped) >= 1024 { // roles come from annotations: bounded, at the price of a repeated line
			clear(s.capped)
		}
		s.capped[key.RoleARN] = struct{}{}
	}
	s.cappedMu.Unlock()
	if !logged {
		s.log.Warn("STS refuses the session duration, sessions of this role last 1h", "role_arn", key.RoleARN,
			"session_duration", key.Duration.String(), "error", refusal)
	}
}

// durationRefused recognises STS's two refusals by their text: both are a plain ValidationError.
func durationRefused(err error) bool {
	issueErr, ok := errors.AsType[*cache.IssueError](err)
	return ok && issueErr.Code == "ValidationError" &&
		(strings.Contains(issueErr.Err.Error(), "MaxSessionDuration") || strings.Contains(issueErr.Err.Error(), "role chaining"))
}

// invalidate makes the SDK fetch the node's credentials again: STS refused those it has.
func invalidate(p aws.CredentialsProvider) {
	if c, ok := p.(interface{ Invalidate() }); ok {
		c.Invalidate()
	}
}

func seconds(d time.Duration) *int32 {
	if d <= 0 {
		return nil
	}
	return aws.Int32(int32(d.Seconds()))
}

func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}
