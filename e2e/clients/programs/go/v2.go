package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

// sdkV2 is the default chain of a program without configuration, which ends at the instance role;
// the client under it keeps its token between fetches. With CALLER_IDENTITY set, each fetch is
// followed by the call that uses the credentials: GetCallerIdentity.
func sdkV2() (fetch, error) {
	ctx := context.Background()
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("go-v2: config: %w", err)
	}
	cache, ok := cfg.Credentials.(*aws.CredentialsCache)
	if !ok {
		return nil, errors.New("go-v2: the default chain is not cached")
	}
	return func() (credentials, error) {
		cache.Invalidate()
		v, err := cache.Retrieve(ctx)
		if err != nil {
			return credentials{}, fmt.Errorf("go-v2: %w", err)
		}
		c := credentials{accessKeyID: v.AccessKeyID, expiration: v.Expires}
		if os.Getenv("CALLER_IDENTITY") == "" {
			return c, nil
		}
		id, err := sts.NewFromConfig(cfg).GetCallerIdentity(ctx, nil)
		if err != nil {
			return credentials{}, fmt.Errorf("go-v2: %w", err)
		}
		c.arn = aws.ToString(id.Arn)
		return c, nil
	}, nil
}
